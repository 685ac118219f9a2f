"""Claims about what must not move: the backbone, frozen factors, the heads of old classes."""

from __future__ import annotations

import torch

from cl_bench.check.observation import Observed
from cl_bench.check.subject import Run, State, differing, some
from cl_bench.check.verdict import Broken
from cl_bench.contracts.strategy import Promises
from cl_bench.network.adapters import AdaptedLinear


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
