"""Claims about cost on a long stream: stored state and the training step grow only as declared."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cl_bench.check.subject import LONG, Broken, Run, Subject
from cl_bench.contracts.low_rank import memory_of
from cl_bench.contracts.strategy import Strategy, state_bytes

_FLOAT = 4  # bytes


@dataclass(frozen=True)
class ExperienceCost:
    """What one experience of the long stream cost.

    Attributes:
        flops: Of the first training step: products of matrices, convolutions and attention; 0 without a step.
        basis: Columns that the memory held in that step.
        classes: Number of old classes in that step.
        experiences: Number of old experiences in that step.
        head: Bytes of the head afterwards.
        memory: Bytes of the memory of protected directions afterwards.
        rest: Bytes of everything else that is kept beyond the pre-trained backbone.
    """

    flops: int
    basis: int
    classes: int
    experiences: int
    head: int
    memory: int
    rest: int


Measured = tuple[Run, list[ExperienceCost]]
"""A training on a long stream, with the cost of every experience."""


def measured(subject: Subject) -> Measured:
    """Train ``subject`` on a long stream, one epoch an experience, and measure what that costs."""
    counter = _Counter()
    run = subject.run({"data.num_experiences": LONG, "trainer.max_epochs": 1}, [counter])
    costs = []
    for experience in run.experiences:
        counter.clear()
        run.learn(experience)
        strategy, kept = run.strategy, memory_of(run.strategy)
        assert isinstance(strategy.head, nn.Module)
        head, memory = state_bytes(strategy.head), 0 if kept is None else state_bytes(kept)
        rest = strategy.stored_bytes - head - memory
        old = experience.classes.start, experience.index
        costs.append(ExperienceCost(counter.flops, counter.basis, *old, head, memory, rest))
    return run, costs


def state(run: Run, costs: list[ExperienceCost]) -> str:
    """Claim: stored state grows with the classes, up to full bases, and as declared.

    The head grows by the same bytes in every experience. The memory of protected directions never holds more
    than all of them. Everything else, such as adapters and moments, is as large after the last experience as
    after the second, but for the declared vectors of each class. If growth with experiences is declared, each
    adds the same bytes to it, and some.
    """
    head = _growth([cost.head for cost in costs])
    if "classes" in run.strategy.promises.state_grows_with:
        return _with_classes(_growth([cost.head + cost.rest for cost in costs]), len(costs))
    if min(head) != max(head):
        raise Broken(
            f"experiences of equal size add {min(head)} to {max(head)} bytes to the head: keep as much for "
            "each class, in whichever experience it comes"
        )
    promises, strategy = run.strategy.promises, run.strategy
    rest = _growth([cost.rest for cost in costs])
    per_class = promises.vectors_per_class * strategy.backbone.feature_dim * _FLOAT
    vectors = per_class * run.experiences[0].num_classes
    if "experiences" in promises.state_grows_with:
        _require_even_growth(rest, vectors)
    elif max(rest) > vectors:
        raise Broken(
            f"an experience adds {max(rest)} bytes outside head and memory, and {vectors} are declared: "
            "merge or drop what it leaves, or declare vectors_per_class or state_grows_with in Promises if "
            "the method needs it"
        )
    kept = memory_of(strategy)
    most = 0 if kept is None else kept.most_bytes
    if costs[-1].memory > most:
        raise Broken(
            f"the memory holds {costs[-1].memory} bytes, and all directions would take {most}: keep each "
            "protected direction once"
        )
    of_memory = f"; the memory holds {costs[-1].memory} of at most {most} bytes" if most else ""
    return (
        f"an experience adds {head[0]} bytes to the head and {max(*rest, 0)} to the rest{of_memory}, "
        f"over {len(costs)} experiences"
    )


def _with_classes(growth: list[int], experiences: int) -> str:
    """Refuse growth of head and rest that rises by more in one experience than in another, or not at all."""
    more = [after - before for before, after in pairwise(growth)]
    if min(more) != max(more) or more[0] <= 0:
        raise Broken(
            f"growth with classes is declared, and what experiences add rises by {min(more)} to {max(more)} "
            "bytes: keep as much for each class seen, or remove classes from state_grows_with in Promises"
        )
    return f"an experience adds {growth[0]} to {growth[-1]} bytes, {more[0]} more each, over {experiences}"


def _require_even_growth(rest: list[int], vectors: int) -> None:
    """Refuse growth that differs between experiences, and a declaration that nothing needs."""
    if min(rest) != max(rest):
        raise Broken(
            f"experiences add {min(rest)} to {max(rest)} bytes outside head and memory, and equal growth is "
            "declared: keep as much for each experience"
        )
    if rest[0] <= vectors:
        raise Broken(
            f"growth with experiences is declared, and an experience adds {rest[0]} bytes outside head and "
            f"memory, {vectors} of them declared as vectors of its classes: drop experiences from "
            "state_grows_with in Promises"
        )


def step(run: Run, costs: list[ExperienceCost]) -> str:
    """Claim: a training step in the last experience takes the operations of one in experience 2.

    Products of matrices, convolutions and attention are counted, forward and backward, with all hooks. A
    method declares what they may grow with, and the declaration holds term by term: all experiences from the
    second on lie on one line in the declared sizes.
    """
    declared = run.strategy.promises.step_grows_with
    later = costs[1:]
    second, last = later[0].flops, later[-1].flops
    if not last:
        return "no training step to count"
    sizes = np.array([[1, *(getattr(cost, name) for name in declared)] for cost in later], dtype=np.float64)
    flops = np.array([cost.flops for cost in later], dtype=np.float64)
    terms = np.linalg.lstsq(sizes, flops, rcond=None)[0]
    unexplained = float(np.abs(sizes @ terms - flops).max())
    if unexplained > 0.5:
        words = " and ".join(_WORDS[name] for name in declared)
        raise Broken(
            f"a step takes {second} operations in experience 2 and {last} in experience {len(costs)}, "
            + (f"which {words} do not explain" if declared else "and no growth is declared")
            + ": merge or drop what older experiences left, or declare step_grows_with in Promises if the "
            "method needs it"
        )
    if second == last:
        return f"{second} operations in experience 2 and in experience {len(costs)}"
    each = ", ".join(
        f"{round(term)} for each of the {_WORDS[name]}"
        for name, term in zip(declared, terms[1:], strict=True)
        if round(term)
    )
    return f"{second} operations in experience 2, {last} in experience {len(costs)}, as declared: {each}"


_WORDS = {
    "basis": "columns in the memory",
    "classes": "old classes",
    "experiences": "old experiences",
}


def _growth(sizes: list[int]) -> list[int]:
    """Return what each experience adds, from the third on: the first two may be special."""
    return [after - before for before, after in pairwise(sizes[1:])]


class _Counter(Callback):
    """Counts the operations of the first training step of an experience, and the columns of the memory."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.flops = self.basis = 0
        self._mode: FlopCounterMode | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.flops:
            assert isinstance(pl_module, Strategy)
            kept = memory_of(pl_module)
            self.basis = 0 if kept is None else sum(kept.dims)
            self._mode = FlopCounterMode(display=False)
            self._mode.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self.flops = self._mode.get_total_flops()
            self._mode = None
