"""The hooks of a strategy around the training of one experience."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from cl_bench.contracts.strategy import Batch, Strategy
from cl_bench.loop import progress
from cl_bench.loop.callbacks import DivergenceGuard
from cl_bench.loop.continuation import Continuation
from cl_bench.loop.course import Course
from cl_bench.processes.ranks import agree


class Lifecycle(Callback):
    """Calls the hooks around training, on the device and without gradients, and times them.

    Args:
        course: Where the run stands.
        continuation: What writes checkpoints and resumes.
        guard: Checked before a checkpoint inside training, so that none follows a loss that is not finite.
    """

    def __init__(self, course: Course, continuation: Continuation, guard: DivergenceGuard) -> None:
        self._course = course
        self._continuation = continuation
        self._guard = guard

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call the hooks although there is no epoch: without one, Lightning skips the loop and its hooks."""
        if progress.no_epoch_left(trainer):
            self.on_train_start(trainer, pl_module)
            self.on_train_end(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the data and prepare the strategy for its first step, unless a resumed run did so."""
        course, strategy = self._course, strategy_of(pl_module)
        for optimizer in trainer.optimizers:
            progress.in_one_kernel(optimizer)
        if course.phase == "expanded":
            with _measuring(course, strategy):
                agree(strategy)
                data = _DataPasses(trainer, before=True)
                strategy.start_head(data)
                strategy.before_training(data)
                agree(strategy)
            course.trainable = strategy.trainable_parameters
            self._continuation.reached(course, "training")
        elif course.phase == "training":
            self._continuation.restore_training()
        course.step(True)
        self._since = course.now()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint if one is due."""
        if trainer.current_epoch and self._continuation.due(self._course):
            self._pause(trainer, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint and end the run if a signal asked for it."""
        # At the end of an epoch a signal waits for the next epoch, or for the pass after training.
        if self._continuation.requested(self._course) and not progress.ends_epoch(trainer):
            self._pause(trainer, batch_idx + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, remember and merge."""
        course, strategy = self._course, strategy_of(pl_module)
        course.step(False)
        if course.phase == "merging":  # resumed here
            self._continuation.restore_random()
        else:
            self._count()
            self._continuation.reached(course, "merging")
        with _measuring(course, strategy):
            strategy.after_training(_DataPasses(trainer, before=False))
            agree(strategy)

    def _pause(self, trainer: Trainer, batches: int) -> None:
        """Write a checkpoint between two steps."""
        self._guard.check(trainer)
        self._count()
        self._continuation.reached(self._course, "training", trainer.current_epoch, batches)
        self._since = self._course.now()

    def _count(self) -> None:
        """Add the seconds since training began, or since the last checkpoint in it."""
        self._course.add("training", self._course.now() - self._since)


class _DataPasses:
    """The training images of the experience at hand, batch by batch on the strategy's device."""

    def __init__(self, trainer: Trainer, *, before: bool) -> None:
        self._trainer = trainer
        self._before = before

    def augmented(self) -> Iterator[Batch]:
        """Yield every training image once, drawn as in training."""
        stream = progress.stream_of(self._trainer)
        return on_device(self._trainer, stream.augmented_dataloader(0 if self._before else 1))

    def plain(self) -> Iterator[Batch]:
        """Yield every training image once, transformed as at test time."""
        return on_device(self._trainer, progress.stream_of(self._trainer).plain_dataloader())


def on_device(trainer: Trainer, loader: DataLoader[Batch]) -> Iterator[Batch]:
    """Yield the batches of ``loader`` in the precision and on the device of ``trainer``."""
    for batch in loader:
        images, labels = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
        yield images, labels


def strategy_of(module: LightningModule) -> Strategy:
    """Return the module as the strategy that it is."""
    assert isinstance(module, Strategy)
    return module


@contextmanager
def at_rest(strategy: Strategy) -> Iterator[None]:
    """No gradients, and layers in evaluation mode."""
    modes = [(module, module.training) for module in strategy.modules()]
    strategy.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _measuring(course: Course, strategy: Strategy) -> Iterator[None]:
    with at_rest(strategy), course.timed("data_passes"):
        yield
