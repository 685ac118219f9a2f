"""Claims about cost on a long stream: neither memory nor a training step grows beyond what is declared."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.flop_counter import FlopCounterMode

from cl_bench.check.subject import LONG, Broken, Run, Subject
from cl_bench.contracts.strategy import Promises, Strategy

_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Experienced:
    """What one experience of the long stream cost.

    Attributes:
        flops: Of the first training step: products of matrices, convolutions and attention; 0 without a step.
        basis: Columns that the memory held in that step.
        old_classes: Number of old classes in that step.
        head: Bytes of the head afterwards.
        memory: Bytes of the memory of protected directions afterwards.
        rest: Bytes of everything else that is kept beyond the pre-trained backbone.
    """

    flops: int
    basis: int
    old_classes: int
    head: int
    memory: int
    rest: int


def experienced(subject: Subject) -> tuple[Run, list[Experienced]]:
    """Train ``subject`` on a long stream, one epoch an experience, and count."""
    counter = _Counter()
    run = subject.run({"data.num_experiences": LONG, "trainer.max_epochs": 1}, [counter])
    costs = []
    for experience in run.experiences:
        counter.clear()
        run.learn(experience)
        of = {part: _bytes(run.strategy, part) for part in ("head", "memory")}
        rest = run.strategy.stored_bytes - sum(of.values())
        costs.append(Experienced(counter.flops, counter.basis, experience.classes.start, **of, rest=rest))
    return run, costs


def memory(run: Run, costs: list[Experienced]) -> str:
    """Claim: what is kept grows with the classes and up to full bases, and by nothing else.

    The head grows by the same bytes in every experience. The memory of protected directions never holds more
    than all of them. Everything else, such as adapters and moments, is as large after the last experience as
    after the second, but for the declared vectors of each class.
    """
    head = {after.head - before.head for before, after in _pairs(costs)}
    if len(head) > 1:
        raise Broken(
            f"the head grows by {min(head)} to {max(head)} bytes an experience of equal size: keep as "
            "much for each class, whenever it is met"
        )
    promises, strategy = run.strategy.promises, run.strategy
    width = strategy.backbone.feature_dim
    allowed = promises.vectors_per_class * width * _FLOAT * run.experiences[0].num_classes
    growth = max(after.rest - before.rest for before, after in _pairs(costs))
    if growth > allowed:
        raise Broken(
            f"beside head and memory, {growth} bytes are added in one experience, and {allowed} are "
            "declared: merge or drop what an experience leaves, or set "
            "promises = Promises(vectors_per_class=...)"
        )
    most = 0 if strategy.memory is None else strategy.memory.most_bytes
    if costs[-1].memory > most:
        raise Broken(f"the memory holds {costs[-1].memory} bytes, more than the {most} it may ever need")
    kept = f"; the memory holds {costs[-1].memory} of at most {most} bytes" if most else ""
    return (
        f"an experience adds {head.pop()} bytes to the head and {max(growth, 0)} to the rest{kept}, "
        f"over {len(costs)} experiences"
    )


def step(costs: list[Experienced], promises: Promises) -> str:
    """Claim: a training step in experience 20 takes the operations of one in experience 2.

    Products of matrices, convolutions and attention are counted, forward and backward, with all hooks. What
    they may grow with is declared, and then holds term by term: all experiences from the second on lie on one
    line in the declared sizes.
    """
    later = costs[1:]
    second, last = later[0].flops, later[-1].flops
    if not last:
        return "no training step to count"
    sizes = [[1.0, *(_size(cost, name) for name in promises.step_grows_with)] for cost in later]
    flops = np.array([cost.flops for cost in later], dtype=np.float64)
    terms = np.linalg.lstsq(np.array(sizes), flops, rcond=None)[0]
    unexplained = float(np.abs(np.array(sizes) @ terms - flops).max())
    if unexplained > 0.5:
        declared = " and ".join(promises.step_grows_with) or "nothing"
        raise Broken(
            f"a step takes {second} operations in experience 2 and {last} in experience {len(costs)}, and "
            f"{declared} is declared to explain it: merge what older experiences left, or set "
            "promises = Promises(step_grows_with=...)"
        )
    if second == last:
        return f"{second} operations in experience 2 and in experience {len(costs)}"
    each = ", ".join(
        f"{round(term)} for each of the {_WORDS[name]}"
        for name, term in zip(promises.step_grows_with, terms[1:], strict=True)
        if round(term)
    )
    return f"{second} operations in experience 2, {last} in experience {len(costs)}, as declared: {each}"


_WORDS = {"basis": "columns in the memory", "classes": "old classes"}


def _size(cost: Experienced, name: str) -> float:
    return float(cost.basis if name == "basis" else cost.old_classes)


def _pairs(costs: list[Experienced]) -> list[tuple[Experienced, Experienced]]:
    """Return each experience with the next, from the second on: the first may be special."""
    return list(pairwise(costs[1:]))


def _bytes(strategy: Strategy, part: str) -> int:
    module = getattr(strategy, part)
    state = {} if module is None else module.state_dict()
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


class _Counter(Callback):
    """Counts the operations of the first training step of an experience, and what they may grow with."""

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
            self.basis = sum(pl_module.memory.dims) if pl_module.memory is not None else 0
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
