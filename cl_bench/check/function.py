"""Claims about the function: it starts where it ended, and merging does not change it."""

from __future__ import annotations

from torch import Tensor

from cl_bench.check.observation import Observed
from cl_bench.check.verdict import Broken
from cl_bench.contracts.strategy import Promises


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
