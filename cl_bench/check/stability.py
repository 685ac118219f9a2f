"""One training of the strategy under check, looked at before, during and after every experience."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cl_bench.check.subject import Broken, Moment, Run, State, Subject, called_around, differing, some, strong
from cl_bench.contracts.strategy import Promises
from cl_bench.network.adapters import AdaptedLinear


@dataclass
class Observed:
    """One experience.

    Attributes:
        before: As the experience before left the strategy, or the constructor.
        ready: After ``before_training``.
        trained: After the last step.
        finished: After ``after_training``.
        strangers: What the optimizer held that is no parameter of the strategy, and the parameters with a
            gradient that it did not hold: one phrase each.
    """

    before: Moment
    ready: Moment
    trained: Moment
    finished: Moment
    strangers: list[str]


def observed(subject: Subject) -> list[Observed]:
    """Train ``subject`` on the tiny stream, with a strong optimizer, and look at every experience."""
    holdings = _Holdings()
    run = strong(subject.run(callbacks=[holdings]))
    return [_one(run, index, holdings) for index in range(len(run.experiences))]


def _one(run: Run, index: int, holdings: _Holdings) -> Observed:
    moments = [run.moment()]

    def look() -> None:
        moments.append(run.moment())

    holdings.strangers = []
    with (
        called_around(run.strategy, "before_training", after=look),
        called_around(run.strategy, "after_training", before=look),
    ):
        run.learn(run.experiences[index])
    look()
    before, ready, trained, finished = moments
    return Observed(before, ready, trained, finished, list(dict.fromkeys(holdings.strangers)))


class _Holdings(Callback):
    """Compares what the optimizers hold with what the strategy has, before the first step and after each."""

    def __init__(self) -> None:
        self.strangers: list[str] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._compare(trainer, pl_module, "before the first step")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._compare(trainer, pl_module, "after a step")

    def _compare(self, trainer: Trainer, module: LightningModule, when: str) -> None:
        held = _held(trainer.optimizers)
        own = {id(parameter): name for name, parameter in module.named_parameters()}
        self.strangers += [
            f"{when} the optimizer holds a tensor {tuple(tensor.shape)} that is no parameter of the strategy"
            for tensor in held
            if id(tensor) not in own
        ]
        ids = {id(tensor) for tensor in held}
        self.strangers += [
            f"{when} the optimizer does not hold {name}, which has a gradient"
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and id(parameter) not in ids
        ]


def _held(optimizers: list[torch.optim.Optimizer]) -> list[torch.Tensor]:
    return [tensor for one in optimizers for group in one.param_groups for tensor in group["params"]]


def start(observed: list[Observed], promises: Promises) -> str:
    """Claim: from the end of an experience to the first step of the next, the function stays.

    Features stay, and so do the logits of old classes; the first experience starts from the backbone.
    """
    changes = []
    for seen in observed:
        old = seen.before.logits.shape[1]
        changes.append(
            max(
                _change(seen.before.features, seen.ready.features),
                _change(seen.before.logits, seen.ready.logits[:, :old]),
            )
        )
    largest = max(changes)
    if promises.start_within is None:
        return f"declared otherwise; the largest change was {largest:.1e}"
    if not largest <= promises.start_within:
        raise Broken(
            f"experience {changes.index(largest) + 1} starts {largest:.1e} away from where the one before "
            f"ended, and {_allowed(promises.start_within)} is promised: start adapters from B = 0, or set "
            "promises = Promises(start_within=...)"
        )
    if largest == 0:
        return f"the same bits in {len(observed)} experiences"
    return f"within {largest:.1e} in {len(observed)} experiences, {promises.start_within:.0e} declared"


def merge(observed: list[Observed], promises: Promises) -> str:
    """Claim: what was trained and what is kept compute the same features."""
    changes = [_change(seen.trained.features, seen.finished.features) for seen in observed]
    learnt = max(_change(seen.ready.features, seen.trained.features) for seen in observed)
    largest = max(changes)
    if promises.merge_within is None:
        return f"declared otherwise; after_training changed features by {largest:.1e}"
    if not largest <= promises.merge_within:
        raise Broken(
            f"after_training of experience {changes.index(largest) + 1} changes features by {largest:.1e}, "
            f"and {_allowed(promises.merge_within)} is promised: merge what was trained, scale included, "
            "or set promises = Promises(merge_within=...)"
        )
    return f"within {largest:.1e}, where training had moved features by {learnt:.1e}"


def _change(one: Tensor, other: Tensor) -> float:
    """Return the largest change of an entry, 0 if there is none to change."""
    return float((one - other).abs().max()) if one.numel() else 0.0


def _allowed(tolerance: float) -> str:
    return f"{tolerance:.0e}" if tolerance else "the same bits"


def frozen(observed: list[Observed], fresh: Run) -> str:
    """Claim: no step moves what is frozen, and the backbone changes by merging adapters alone.

    Frozen during the steps are the backbone and every parameter without a gradient, whatever a weight decay
    would make of it. From one experience to the next, adapted rows of a weight may change; the rest of the
    backbone may not.
    """
    backbone = _backbone(fresh)
    moved_by_training = False
    for index, seen in enumerate(observed, 1):
        parameters = backbone.keys() | (_parameters(fresh, seen.ready.state) - seen.ready.trained)
        moved = sorted(parameters.intersection(differing(seen.ready.state, seen.trained.state)))
        if moved:
            raise Broken(
                f"the steps of experience {index} move {some(moved)}, under a weight decay: freeze a "
                "parameter with requires_grad_(False) in expand; a gradient of zero does not hold it"
            )
        moved_by_training |= bool(differing(seen.ready.state, seen.trained.state))
        outside = _outside_adapters(seen.before.state, seen.finished.state, backbone, fresh)
        if outside:
            raise Broken(
                f"experience {index} changes {some(outside)}, where no adapter could have been merged: "
                "change the backbone by AdaptedLinear.merge and subtract alone"
            )
    if fresh.strategy.trains and not moved_by_training:
        raise Broken("no step moves anything: let a parameter require a gradient after expand")
    return f"{len(backbone)} tensors of the backbone and all others without a gradient, bit by bit"


def old_head(observed: list[Observed], promises: Promises) -> str:
    """Claim: an experience leaves what the head holds of older classes as it was."""
    changed = []
    for index, seen in enumerate(observed, 1):
        for name, before in _of_head(seen.before.state).items():
            after = seen.finished.state.get(name)
            kept = (
                after is not None and after.ndim == before.ndim and torch.equal(after[: len(before)], before)
            )
            changed += [] if kept else [(index, name)]
    if not promises.keeps_old_head:
        return f"declared otherwise; {len(changed)} changes in {len(observed)} experiences"
    if changed:
        index, name = changed[0]
        raise Broken(
            f"experience {index} changes {name} in the rows of old classes: train the newest part of the "
            "head alone, or set promises = Promises(keeps_old_head=False)"
        )
    old = len(_of_head(observed[-1].before.state))
    return f"{old} tensors of old classes after {len(observed)} experiences, bit by bit"


def _of_head(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name.startswith("head.") and tensor.ndim}


def _backbone(fresh: Run) -> dict[str, bool]:
    """Return the names of the pre-trained tensors, and whether each is where the backbone has it.

    A layer that a method puts around another gives its tensors other names; they are known by their values.
    """
    pretrained = {f"backbone.{name}": value for name, value in fresh.pretrained().items()}
    own = dict(fresh.strategy.named_parameters())
    found = {name: True for name in pretrained if name in own}
    for missing in pretrained.keys() - own.keys():
        for name in own.keys() - pretrained.keys():
            if torch.equal(pretrained[missing], own[name]):
                found[name] = False
    return found


def _parameters(fresh: Run, state: State) -> set[str]:
    buffers = {name for name, _ in fresh.strategy.named_buffers()}
    return state.keys() - buffers


def _outside_adapters(before: State, after: State, backbone: dict[str, bool], fresh: Run) -> list[str]:
    """Return the names of pre-trained tensors that changed, apart from rows that carry an adapter."""
    adapted = {
        f"{name}.weight": layer
        for name, layer in fresh.strategy.named_modules()
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


def optimizer(observed: list[Observed]) -> str:
    """Claim: before the first step and after each, the optimizer holds the strategy's own parameters.

    It was built before the hooks around training ran. A parameter that one of them replaces is trained no
    more, and nothing says so.
    """
    for index, seen in enumerate(observed, 1):
        if seen.strangers:
            raise Broken(
                f"{seen.strangers[0]}, in experience {index}: write parameters in place, and make new ones "
                "or thaw old ones in expand"
            )
    trained = sorted({len(seen.ready.trained) for seen in observed})
    return f"{' to '.join(map(str, trained))} tensors in each of {len(observed)} experiences"
