"""Claims about cost on a long stream: stored state and the training step grow only as declared."""

from __future__ import annotations

from collections.abc import Sequence
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
_MOMENTS = 4  # the most that an optimizer of torch keeps for a parameter, its count of steps included
_TOGETHER = {"classes", "experiences"}


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
        optimizer: Bytes of the optimizer of the stream afterwards, if there is one.
        rest: Bytes of everything else that is kept beyond the pre-trained backbone.
    """

    flops: int
    basis: int
    classes: int
    experiences: int
    head: int
    memory: int
    optimizer: int
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
        optimizer = strategy.optimizer_bytes
        rest = strategy.stored_bytes - head - memory - optimizer
        old = experience.classes.start, experience.index
        costs.append(ExperienceCost(counter.flops, counter.basis, *old, head, memory, optimizer, rest))
    return run, costs


def state(run: Run, costs: list[ExperienceCost]) -> str:
    """Claim: stored state grows with the classes, up to full bases, and as declared.

    The head grows by the same bytes in every experience. The memory of protected directions never holds more
    than all of them, and an optimizer of the stream a few numbers for each that it trains. Everything else,
    such as adapters and moments, is as large after the last experience as after the second, but for the
    declared vectors of each class. What is declared to grow does, and no faster.
    """
    promises, strategy = run.strategy.promises, run.strategy
    per_class = promises.vectors_per_class * strategy.backbone.feature_dim * _FLOAT
    vectors = per_class * run.experiences[0].num_classes
    head, rest = _growth([cost.head for cost in costs]), _growth([cost.rest for cost in costs])
    if "classes" in promises.state_grows_with:
        _require_growth_with_classes([a + b for a, b in zip(head, rest, strict=True)])
    else:
        if min(head) != max(head):
            raise Broken(
                f"experiences of equal size add {min(head)} to {max(head)} bytes to the head: keep as much "
                "for each class, in whichever experience it comes"
            )
        most = costs[1].rest - costs[0].rest if "experiences" in promises.state_grows_with else vectors
        _require_growth(rest, vectors, most, "experiences" in promises.state_grows_with)
    if vectors and min(rest) < vectors:
        raise Broken(
            f"vectors_per_class={promises.vectors_per_class} is declared, and an experience adds {min(rest)} "
            f"bytes of {vectors} outside head and memory: declare as many vectors as the method keeps"
        )
    kept = memory_of(strategy)
    most = 0 if kept is None else kept.most_bytes
    if costs[-1].memory > most:
        raise Broken(
            f"the memory holds {costs[-1].memory} bytes, and all directions would take {most}: keep each "
            "protected direction once"
        )
    _require_moments(strategy)
    of_memory = f"; the memory holds {costs[-1].memory} of at most {most} bytes" if most else ""
    return (
        f"an experience adds {head[0]} bytes to the head and {max(*rest, 0)} to the rest{of_memory}, "
        f"over {len(costs)} experiences"
    )


def _require_growth(rest: list[int], vectors: int, most: int, declared: bool) -> None:
    """Refuse growth beyond ``most``, and a declaration of growth with experiences that nothing needs."""
    if declared and max(rest) <= vectors:
        raise Broken(
            f"growth with experiences is declared, and an experience adds {max(rest)} bytes outside head and "
            f"memory, {vectors} of them declared as vectors of its classes: remove experiences from "
            "state_grows_with in Promises"
        )
    if declared and max(rest) > most:
        raise Broken(
            f"an experience adds {max(rest)} bytes outside head and memory, more than the {most} of "
            "experience 2: keep no more for an experience than for the one before"
        )
    if not declared and max(rest) > most:
        raise Broken(
            f"an experience adds {max(rest)} bytes outside head and memory, and {most} are declared: merge "
            "or drop what it leaves"
        )


def _require_growth_with_classes(whole: list[int]) -> None:
    """Refuse growth of head and rest that rises by more in one experience than in another, or not at all."""
    steps = [after - before for before, after in pairwise(whole)]
    if max(steps) <= 0:
        raise Broken(
            "growth with classes is declared, and no experience adds more bytes than the one before: remove "
            "classes from state_grows_with in Promises"
        )
    if max(steps) > steps[0]:
        raise Broken(
            f"what an experience adds outside of the memory grows by {steps[0]} to {max(steps)} bytes: keep "
            "as much for each class seen, in whichever experience"
        )


def _require_moments(strategy: Strategy) -> None:
    """Refuse an optimizer of the stream that holds more than moments of its parameters."""
    optimizer = strategy.kept_optimizer
    if optimizer is None:
        return
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    most = sum(_MOMENTS * p.numel() * p.element_size() + _MOMENTS * 8 for p in trained)
    if strategy.optimizer_bytes > most:
        raise Broken(
            f"the optimizer of the stream keeps {strategy.optimizer_bytes} bytes, and {_MOMENTS} numbers for "
            f"each that it trains take {most}: keep nothing but moments in its state"
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
    if not last and not declared:
        return "no training step to count"
    unexplained, terms = _fit(later, declared)
    if unexplained > 0.5:
        words = " and ".join(_WORDS[name] for name in declared)
        raise Broken(
            f"a step takes {second} operations in experience 2 and {last} in experience {len(costs)}, "
            + (f"which {words} do not explain" if declared else "and no growth is declared")
            + ": merge or drop what older experiences left"
        )
    for name in declared:
        # On a stream of equal experiences, classes and experiences grow together.
        together = _TOGETHER if name in _TOGETHER else {name}
        if _fit(later, [other for other in declared if other not in together])[0] <= 0.5:
            raise Broken(
                f"growth with {name} is declared, and a step takes as many operations whatever the number of "
                f"{_WORDS[name]}: remove {name} from step_grows_with in Promises"
            )
    if second == last:
        return f"{second} operations in experience 2 and in experience {len(costs)}"
    each = ", ".join(
        f"{round(term)} for each of the {_WORDS[name]}"
        for name, term in zip(declared, terms, strict=True)
        if round(term)
    )
    return f"{second} operations in experience 2, {last} in experience {len(costs)}, as declared: {each}"


_WORDS = {
    "basis": "columns in the memory",
    "classes": "old classes",
    "experiences": "old experiences",
}


def _fit(costs: list[ExperienceCost], names: Sequence[str]) -> tuple[float, list[float]]:
    """Return how far operations are from a sum of terms in the sizes ``names``, and the factor of each."""
    sizes = np.array([[1, *(getattr(cost, name) for name in names)] for cost in costs], dtype=np.float64)
    flops = np.array([cost.flops for cost in costs], dtype=np.float64)
    terms = np.linalg.lstsq(sizes, flops, rcond=None)[0]
    return float(np.abs(sizes @ terms - flops).max()), terms[1:].tolist()


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
