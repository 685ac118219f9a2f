"""Callbacks of every run: the accuracy matrix, and the loss that must stay finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from cl_bench.loop.progress import stream_of
from cl_bench.processes.ranks import of_all, total
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
        self.experience_of_class = torch.repeat_interleave(
            torch.arange(result.num_experiences),
            torch.tensor([stop - start for start, stop in result.experiences]),
        )
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
        self.confusion_within.update(self._within_experience(logits, labels).argmax(dim=1), labels)

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
                f"{counted} of {expected} test images were evaluated after experience {index + 1}: "
                "a result needs them all, so leave limit_test_batches alone."
            )

    def _within_experience(self, logits: Tensor, labels: Tensor) -> Tensor:
        seen = self.experience_of_class[: logits.shape[1]]
        return logits.masked_fill(seen != self.experience_of_class[labels, None], -math.inf)

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


class Diverged(RuntimeError):
    """A number that has to be finite is not."""

    @classmethod
    def at(cls, what: str) -> Diverged:
        """Return an error about ``what`` is not finite and where, with a remedy."""
        remedy = "lower the learning rate, or clip gradients with --trainer.gradient_clip_val."
        return cls(f"{what}: {remedy}")


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
            experience = stream_of(trainer).experience
            raise Diverged.at(
                f"The loss is not finite at step {min(steps)}, in epoch {trainer.current_epoch + 1} of "
                f"experience {experience.index + 1}"
            )
