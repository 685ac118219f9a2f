"""What training changes and what it leaves, observed four times in every experience."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from cl_bench.check.subject import (
    Broken,
    Moment,
    Run,
    State,
    Subject,
    allowed,
    called_around,
    differing,
    largest_change,
    some,
    strong,
)
from cl_bench.contracts.strategy import Promises, Strategy
from cl_bench.network.adapters import AdaptedLinear

_ROUNDING = 1e-5  # of a feature


@dataclass(frozen=True)
class Stages:
    """One experience, observed four times.

    Attributes:
        before: As the constructor or the previous experience left the strategy.
        ready: After ``before_training``.
        trained: After the last step.
        finished: After ``after_training``.
        mismatches: Tensors that the optimizer held although they are not parameters of the strategy, and
            parameters with a gradient that it did not hold, each in a phrase.
    """

    before: Moment
    ready: Moment
    trained: Moment
    finished: Moment
    mismatches: list[str]


Observed = tuple[Run, list[Stages]]
"""A training under a strong optimizer, with the stages of every experience."""


def observed(subject: Subject) -> Observed:
    """Train ``subject`` on the tiny stream with a strong optimizer, and observe every experience."""
    holdings = _Holdings()
    run = strong(subject.run(callbacks=[holdings]))
    return run, [_stages(run, index, holdings) for index in range(len(run.experiences))]


def _stages(run: Run, index: int, holdings: _Holdings) -> Stages:
    moments = [run.moment()]

    def observe() -> None:
        moments.append(run.moment())

    holdings.mismatches = []
    with (
        called_around(run.strategy, "before_training", after=observe),
        called_around(run.strategy, "after_training", before=observe),
    ):
        run.learn(run.experiences[index])
    observe()
    before, ready, trained, finished = moments
    return Stages(before, ready, trained, finished, list(dict.fromkeys(holdings.mismatches)))


class _Holdings(Callback):
    """Compares the tensors of the optimizers with the parameters of the strategy before and after steps."""

    def __init__(self) -> None:
        self.mismatches: list[str] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._compare(trainer, pl_module, "before the first step")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._compare(trainer, pl_module, "after a step")

    def _compare(self, trainer: Trainer, module: LightningModule, when: str) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        held = {id(tensor): tensor for group in groups for tensor in group["params"]}
        own = {id(parameter): name for name, parameter in module.named_parameters()}
        self.mismatches += [
            f"{when} the optimizer holds a tensor {tuple(tensor.shape)} that is not one of the strategy's"
            for key, tensor in held.items()
            if key not in own
        ]
        self.mismatches += [
            f"{when} the optimizer does not hold {name}, which requires a gradient"
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and id(parameter) not in held
        ]


def start(run: Run, experiences: list[Stages]) -> str:
    """Claim: from the end of an experience to the first step of the next, the function does not change.

    Features stay, and so do the logits of old classes. The first experience starts from the function that the
    constructor made, unless its ``expand`` draws what the features need.
    """
    promises, first = run.strategy.promises, experiences[0]
    if first.before.unready and not promises.drawn_once:
        raise Broken(
            f"before the first experience, features stops with {first.before.unready}: let the constructor "
            "build what it needs, without random numbers; what is drawn once for the whole stream is drawn "
            "in the first expand, and declared by drawn_once in Promises"
        )
    if promises.drawn_once and torch.equal(first.before.features, first.ready.features):
        raise Broken(
            "drawn_once is declared, and experience 1 draws nothing that changes a feature: remove "
            "drawn_once from Promises"
        )
    changes = []
    for seen in experiences[1:] if promises.drawn_once else experiences:
        old = seen.before.logits.shape[1]
        of_features = largest_change(seen.before.features, seen.ready.features)
        changes.append(max(of_features, largest_change(seen.before.logits, seen.ready.logits[:, :old])))
    drawn = "after the parts drawn in experience 1, " if promises.drawn_once else ""
    largest = max(changes)
    _require_used("start_within", promises.start_within, Promises().start_within, largest)
    if promises.start_within is None:
        return f"{drawn}declared otherwise; the largest change was {largest:.1e}"
    if not largest <= promises.start_within:
        index = changes.index(largest) + len(experiences) - len(changes)
        raise Broken(
            f"experience {index + 1} starts {largest:.1e} away from "
            f"{'where the previous one ended' if index else 'what the constructor made'}, and "
            f"{allowed(promises.start_within)} is promised: "
            + _remedy_of_start(index, experiences[index], promises.drawn_once)
        )
    if largest == 0:
        return f"{drawn}the same bits in {len(changes)} experiences"
    return f"{drawn}within {largest:.1e} in {len(changes)} experiences, {promises.start_within:.0e} declared"


def _remedy_of_start(index: int, seen: Stages, drawn_once: bool) -> str:
    before, ready = seen.before.state, seen.ready.state
    written = [name for name in differing(before, ready) if not name.startswith("head.")]
    cause = f"expand or before_training writes {some(written)}; " if written else ""
    factors = [name for name in written if ".adapters." in name]
    if factors and len(factors) == len(written):
        return f"{cause}let a new adapter add nothing before the first step, by an up-projection of zeros"
    if index == 0:
        return (
            f"{cause}let it change no feature before the first step, or declare drawn_once in Promises if it "
            "is drawn once and serves the whole stream"
        )
    if drawn_once:
        return (
            f"{cause}draw in the first experience only, and let what is new add nothing before the first step"
        )
    return f"{cause}let what is new add nothing before the first step"


def frozen(run: Run, experiences: list[Stages]) -> str:
    """Claim: no step moves what is frozen, and only merging adapters changes the backbone.

    During the steps, the backbone and every parameter without a gradient are frozen, even under a weight
    decay. From one experience to the next, the adapted rows of a weight may change, and nothing else of the
    backbone. A method that adds parts of one kind in every experience, such as adapters, trains the newest:
    what an older experience trained is frozen once parameters of its shape are added. Single numbers, such as
    the magnitude of a direction, may go on learning.
    """
    backbone = _backbone(run, experiences[0].before.state)
    learnt: set[str] = set()
    for index, seen in enumerate(experiences, 1):
        if old := _thawed(seen, learnt):
            raise Broken(
                f"the steps of experience {index} move {some(old)}, which an older experience trained, "
                "although new parameters of the same shape are there: freeze the old ones with "
                "requires_grad_(False) in expand"
            )
        moved = set(differing(seen.ready.state, seen.trained.state))
        learnt |= moved & seen.ready.trained
        if kept := sorted(moved & (backbone.keys() | seen.ready.frozen)):
            raise Broken(
                f"under a weight decay, the steps of experience {index} move {some(kept)}: freeze a "
                "parameter with requires_grad_(False) in expand; a gradient of zero does not hold it"
            )
        outside = _outside_adapters(seen.before.state, seen.finished.state, backbone, run.strategy)
        if outside:
            raise Broken(
                f"experience {index} changes {some(outside)}, where no adapter could have been merged: leave "
                "pre-trained weights as they are, but for what AdaptedLinear.merge and subtract write"
            )
    if not learnt and any(seen.before.trained | seen.ready.trained for seen in experiences):
        raise Broken(
            "no step moves anything, although some parameters require a gradient: let the loss depend on "
            "them, and leave them unfrozen in expand"
        )
    return f"{len(backbone)} tensors of the backbone and all others without a gradient, bit by bit"


def _thawed(seen: Stages, learnt: set[str]) -> list[str]:
    """Return the parameters outside the head that older experiences trained and that move with new ones."""
    state = {name: seen.ready.state[name] for name in seen.ready.trained if not name.startswith("head.")}
    added = {(_layer(name), value.shape) for name, value in state.items() if name not in seen.before.state}
    moved = differing(state, {name: seen.trained.state[name] for name in state})
    return [
        name
        for name in moved
        if name in learnt and state[name].numel() > 1 and (_layer(name), state[name].shape) in added
    ]


def _layer(name: str) -> str:
    """Return the layer whose adapter has the parameter, empty if it belongs to none."""
    return name.partition(".adapters.")[0] if ".adapters." in name else ""


def old_head(run: Run, experiences: list[Stages]) -> str:
    """Claim: an experience does not change what the head holds of older classes."""
    changed = []
    for index, seen in enumerate(experiences, 1):
        for name, before in _of_head(seen.before.state).items():
            after = seen.finished.state.get(name)
            kept = (
                after is not None and after.ndim == before.ndim and torch.equal(after[: len(before)], before)
            )
            changed += [] if kept else [(index, name)]
    if not run.strategy.promises.keeps_old_head:
        if not changed:
            raise Broken(
                "keeps_old_head=False is declared, and no experience changes what the head holds of older "
                "classes: remove it from Promises"
            )
        return f"declared otherwise; {len(changed)} changes in {len(experiences)} experiences"
    if changed:
        index, name = changed[0]
        raise Broken(
            f"experience {index} changes {name} in the rows of old classes: write only what belongs to new "
            "classes"
        )
    old = len(_of_head(experiences[-1].before.state))
    return f"{old} tensors of old classes after {len(experiences)} experiences, bit by bit"


def after_training(run: Run, experiences: list[Stages]) -> str:
    """Claim: the features that training ended with are those that the next experience starts from."""
    promises = run.strategy.promises
    changes = [largest_change(seen.trained.features, seen.finished.features) for seen in experiences]
    learnt = max(largest_change(seen.ready.features, seen.trained.features) for seen in experiences)
    largest = max(changes)
    _require_used("merge_within", promises.merge_within, Promises().merge_within, largest)
    if promises.merge_within is None:
        return f"declared otherwise; after_training changed features by {largest:.1e}"
    if not largest <= promises.merge_within:
        raise Broken(
            f"after_training of experience {changes.index(largest) + 1} changes features by {largest:.1e}, "
            f"and {allowed(promises.merge_within)} is promised: keep exactly what was trained, with its "
            "scale if it is merged"
        )
    return f"within {largest:.1e}, while training had moved features by {learnt:.1e}"


def constant(run: Run, experiences: list[Stages]) -> str:
    """Claim: after the first experience, the map that is declared constant gives the same bits."""
    name = run.strategy.promises.constant
    first, *later = (seen.finished.constant for seen in experiences)
    changes = [largest_change(first, other) for other in later]
    if name is None:
        hint = "" if any(changes) else ', and features never changed: Promises(constant="features") would do'
        return f"nothing is declared{hint}"
    if any(changes):
        index = next(index for index, change in enumerate(changes) if change)
        raise Broken(
            f"{name} is declared constant, and experience {index + 2} changes it by {changes[index]:.1e}: "
            "freeze all that it depends on after the first experience, or drop constant from Promises"
        )
    return f"{name}, bit by bit over {len(experiences)} experiences"


def optimizer(run: Run, experiences: list[Stages]) -> str:
    """Claim: before the first step and after each, the optimizer holds the strategy's own parameters.

    It was built before the hooks around training ran. If one of them replaces a parameter, the optimizer
    trains the old one, and no error shows it.
    """
    for index, seen in enumerate(experiences, 1):
        if seen.mismatches:
            raise Broken(
                f"{seen.mismatches[0]}, in experience {index}: write parameters in place, and make or thaw "
                "parameters in expand"
            )
    trained = sorted({len(seen.ready.trained) for seen in experiences})
    most = f" to {trained[-1]}" if len(trained) > 1 else ""
    return f"{trained[0]}{most} tensors in each of {len(experiences)} experiences"


def _of_head(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name.startswith("head.") and tensor.ndim}


def _backbone(run: Run, state: State) -> dict[str, bool]:
    """Return the names of the pre-trained tensors, and whether each kept the name that the backbone gave it.

    A layer that a method puts around another renames its tensors; these are recognised by their values in
    ``state``, that before the first experience.
    """
    pretrained = {f"backbone.{name}": value for name, value in run.pretrained().items()}
    found = {name: True for name in pretrained if name in state}
    for missing in pretrained.keys() - state.keys():
        for name in state.keys() - pretrained.keys():
            if torch.equal(pretrained[missing], state[name]):
                found[name] = False
    return found


def _outside_adapters(
    before: State, after: State, backbone: dict[str, bool], strategy: Strategy
) -> list[str]:
    """Return the names of the pre-trained tensors that changed in rows without an adapter."""
    adapted = {
        f"{name}.weight": layer
        for name, layer in strategy.named_modules()
        if isinstance(layer, AdaptedLinear)
    }
    changed = []
    for name in sorted(name for name, in_place in backbone.items() if in_place):
        free = torch.ones(len(before[name]), dtype=torch.bool)
        for rows in adapted[name].rows.values() if name in adapted else ():
            free[rows] = False
        if not torch.equal(before[name][free], after[name][free]):
            changed.append(name)
    return changed


def _require_used(name: str, promised: float | None, default: float | None, found: float) -> None:
    """Refuse a tolerance that is looser than the default although the method does not need it."""
    assert default is not None
    if promised is None:
        if found > default:
            return
        raise Broken(
            f"{name}=None is declared, and the largest change is {found:.1e}: remove {name} from Promises"
        )
    if promised > default and (found <= default or promised > max(_ROUNDING, 100 * found)):
        raise Broken(
            f"{name}={promised:.0e} is declared, and the largest change is {found:.1e}: promise what is "
            f"kept, the default of {default:.0e} if that is enough"
        )
