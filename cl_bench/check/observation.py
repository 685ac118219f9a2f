"""One training of the strategy under check, looked at before, during and after every experience."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from cl_bench.check.subject import Moment, Run, Subject, called_around, strong


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
