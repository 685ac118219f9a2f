"""Callbacks of every run: accuracy matrix, constant features, a loss that stays finite, the hooks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassConfusionMatrix

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.contracts.strategy import Strategy
from cl_bench.data.experience import Batch, Experience
from cl_bench.loop import progress
from cl_bench.loop.continuation import Continuation
from cl_bench.loop.course import Course, Diverged
from cl_bench.loop.provenance import circumstances
from cl_bench.measure.kept import KeptBatch, KeptBatches
from cl_bench.network.heads import FeatureMap, pooled
from cl_bench.processes.fingerprints import fingerprint
from cl_bench.processes.ranks import agree, of_all, place, total
from cl_bench.results.result import Result, Row


class StreamMetrics(Callback):
    """Fill row after row of the accuracy matrix, as integer counts, from one pass over all classes seen.

    If the test images come from several domains, a batch ends with the index of each image's domain, and
    correct images are also counted by domain.

    The callback sees logits and labels, never the model. One confusion matrix gives the class-incremental
    count (its diagonal) and the count of images placed in their own experience (its diagonal blocks); a
    second one, of predictions restricted to the true experience, gives the task-masked count. Each process of
    a run counts its own images, and a row holds the counts of all.

    Args:
        result: Its ``rows`` are filled; its ``experiences`` give the experience of each class.

    Attributes:
        row: Index of the row that the next evaluation fills.
    """

    def __init__(self, result: Result) -> None:
        self.result = result
        self.row = 0
        self.experience_of_class = experience_of_class(result)
        num_classes = max(2, len(self.experience_of_class))  # torchmetrics refuses a matrix of one class
        self.confusion = MulticlassConfusionMatrix(num_classes, validate_args=False)
        self.confusion_within = MulticlassConfusionMatrix(num_classes, validate_args=False)
        self.correct_by_domain = torch.zeros(len(result.domains), num_classes, dtype=torch.int64)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a row."""
        for confusion in (self.confusion, self.confusion_within):
            confusion.to(pl_module.device).reset()
        self.infinite = torch.zeros((), dtype=torch.int64, device=pl_module.device)
        self.correct_by_domain = torch.zeros_like(self.correct_by_domain, device=pl_module.device)
        self.experience_of_class = self.experience_of_class.to(pl_module.device)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count one batch."""
        logits, labels = outputs, batch[1]
        self.infinite += (~logits.isfinite()).sum()
        if self.result.domains:
            self._count_by_domain(logits.argmax(dim=1) == labels, labels, batch[2])
        self.confusion.update(logits.argmax(dim=1), labels)
        within = within_experience(logits, labels, self.experience_of_class)
        self.confusion_within.update(within.argmax(dim=1), labels)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the row to the result, and its metrics to the loggers.

        Raises:
            Diverged: If a logit is not finite.
            ValueError: If not every test image of the classes seen was evaluated.
        """
        i, (_, seen) = self.row, self.result.experiences[self.row]
        infinite, confusion, within, by_domain = map(
            total,
            (self.infinite, self.confusion.confmat, self.confusion_within.confmat, self.correct_by_domain),
        )
        if infinite:
            raise Diverged.at(f"A logit is not finite after experience {i + 1}")
        self._require_whole_evaluation(i, seen, int(confusion.sum()))
        row = self._row(confusion[:seen, :seen], within[:seen, :seen], by_domain[:, :seen])
        self.result.rows += [None] * (i - len(self.result.rows))
        self.result.rows.append(row)
        values = {"stream/experience": float(i + 1)} | {
            f"stream/{name}": value
            for name, value in self.result.metrics_after(i).items()
            if not math.isnan(value)
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def _require_whole_evaluation(self, index: int, num_classes_seen: int, counted: int) -> None:
        expected = sum(self.result.test_images[:num_classes_seen])
        if counted != expected:
            raise ValueError(
                f"{counted} of {expected} images were evaluated after experience {index + 1}: "
                "a result needs them all, so do not set limit_test_batches."
            )

    def _count_by_domain(self, correct: Tensor, labels: Tensor, domains: Tensor) -> None:
        """Count images (B,) by their domain and class."""
        self.correct_by_domain.index_put_((domains, labels), correct.to(torch.int64), accumulate=True)

    def _row(self, confusion: Tensor, within: Tensor, by_domain: Tensor) -> Row:
        """Return the counts in two matrices (C, C) over the C classes seen, and one (domains, C)."""
        seen = self.experience_of_class[: len(confusion)]
        same_experience = seen[:, None] == seen[None, :]
        return Row(
            correct=confusion.diagonal().tolist(),
            correct_within_experience=within.diagonal().tolist(),
            correct_experience=(confusion * same_experience).sum(dim=1).tolist(),
            correct_by_domain=by_domain.tolist(),
        )


def experience_of_class(result: Result) -> Tensor:
    """Return the index of the experience that brings each class (C,)."""
    sizes = torch.tensor([stop - start for start, stop in result.experiences])
    return torch.repeat_interleave(torch.arange(result.num_experiences), sizes)


def row_of(result: Result, experience: Experience) -> int:
    """Return the index of the row that an evaluation after ``experience`` fills; joint training has one."""
    return experience.index if result.regime == "sequential" else result.num_experiences - 1


def within_experience(logits: Tensor, labels: Tensor, experiences: Tensor) -> Tensor:
    """Return logits (B, classes seen) with minus infinity outside the experience of each of the labels (B,).

    Args:
        logits: Of all classes seen.
        labels: The true classes.
        experiences: The experience of each class, as :func:`experience_of_class` returns it.
    """
    return logits.masked_fill(experiences[: logits.shape[1]] != experiences[labels, None], -math.inf)


class Once(Callback):
    """Sends every test image only once through what the strategy promises to be constant.

    :class:`~cl_bench.contracts.strategy.Promises` names the map, ``features`` or ``query``. Its output for a
    test batch is kept, and returned when a later experience evaluates the batch again; for constant features
    the images are not loaded either. Test batches stay the same throughout a stream, so every logit has the
    same bits as without. If the weights have changed after all, everything is sent again.

    Args:
        strategy: The method.
        datamodule: The stream, set up.
        result: The result of the run.
        folder: Where outputs are kept for a resumed run; a temporary folder if None.
    """

    def __init__(
        self, strategy: Strategy, datamodule: StreamDataModule, result: Result, folder: Path | None
    ) -> None:
        self._strategy = strategy
        self._datamodule = datamodule
        self._result = result
        self._folder = folder
        self._name = strategy.promises.constant if result.regime == "sequential" else None
        self._kept: KeptBatches | None = None
        self._index: int | None = None
        self._labels: Tensor
        self._fresh: list[KeptBatch] = []

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use what is kept while the context is open, and keep what is new when it ends without an error."""
        if self._name is None:
            yield
            return
        if self._kept is None:  # the processes of a run have met by now
            rank, processes = place()
            own = f"{rank + 1}-of-{processes}"
            self._kept = KeptBatches(None if self._folder is None else self._folder / self._name / own)
        self._kept.open(self._key(self._name))
        self._fresh = []
        self._datamodule.blank_test_batches = len(self._kept.batches) if self._name == "features" else 0
        original: FeatureMap = getattr(self._strategy, self._name)
        setattr(self._strategy, self._name, lambda images: self._output(original, images))
        try:
            yield
        finally:
            delattr(self._strategy, self._name)
            self._datamodule.blank_test_batches = 0
        self._kept.add(self._fresh)

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note which batch is evaluated."""
        self._index, self._labels = batch_idx, batch[1]

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Clear the index of the batch."""
        self._index = None

    def _output(self, original: FeatureMap, images: Tensor) -> Tensor:
        """Return what is kept of the batch at hand, or what ``original`` makes of its images."""
        if self._index is None or self._kept is None:
            return pooled(original(images))
        known = len(self._kept.batches)
        if self._index < known + len(self._fresh):
            early = self._index < known
            batch = self._kept.batches[self._index] if early else self._fresh[self._index - known]
            if torch.equal(batch.labels, self._labels.cpu()):
                return batch.outputs.to(self._strategy.device)
        found = pooled(original(images))
        if self._index == known + len(self._fresh):
            self._fresh.append(KeptBatch(self._labels.cpu(), found.detach().cpu()))
        return found

    def _key(self, name: str) -> dict[str, Any]:
        """Return all that the outputs depend on: weights, views and batches, machine and versions."""
        weights = {
            key: int(fingerprint(value))
            for key, value in self._strategy.state_dict().items()
            if isinstance(value, Tensor)
            and (key.startswith("backbone.") if name == "query" else not key.startswith("head."))
        }
        return {
            "weights": weights,
            "protocol": vars(self._result.protocol),
            "test_batch_size": self._datamodule.test_batch_size,
            "circumstances": circumstances(self._result.provenance),
        }


class DivergenceGuard(Callback):
    """Stops a run whose loss was not finite; it checks once an epoch, so no step waits for the device."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier steps."""
        self._first = torch.zeros((), dtype=torch.int64, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the first step whose loss was not finite."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            step = torch.where(loss.detach().isfinite().all(), 0, trainer.global_step)
            self._first = torch.where(self._first > 0, self._first, step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the epoch.

        Raises:
            Diverged: If a loss was not finite.
        """
        self.check(trainer)

    def check(self, trainer: Trainer) -> None:
        """Check the steps of the experience so far, on all processes.

        Raises:
            Diverged: If a loss was not finite.
        """
        steps = [step for step in of_all(int(self._first)) if step]
        if steps:
            experience = progress.stream_of(trainer).experience
            raise Diverged.at(
                f"The loss is not finite at step {min(steps)}, in epoch {trainer.current_epoch + 1} of "
                f"experience {experience.index + 1}"
            )


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
        """Call the hooks around training if no epoch is left, since Lightning then skips its loop."""
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
        else:
            self._continuation.restore_states()
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
        if course.phase == "training":
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
