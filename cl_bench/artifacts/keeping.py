"""Callbacks that keep the model and the predictions of a run after every experience.

What they write replaces what an earlier attempt wrote, whole or not at all. A run that was cut off resumes
before anything that it has not finished, so it ends with the files of an uninterrupted run. The first of
several processes writes, for all of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cl_bench.artifacts import MODELS, PREDICTIONS, models
from cl_bench.contracts.strategy import Strategy
from cl_bench.data.loading import StreamLoader
from cl_bench.loop.callbacks import experience_of_class, row_of, strategy_of, within_experience
from cl_bench.loop.progress import stream_of
from cl_bench.loop.snapshot import Pretrained, snapshot
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.processes.ranks import is_first, of_all
from cl_bench.results.result import Result

Keep = Literal["model", "predictions", "all"]
"""What a run keeps after every experience."""

_TOP = 5


def keepers(
    keep: Keep | None,
    folder: Path,
    strategy: Strategy,
    cell: str,
    *,
    logits: bool,
    require: Callable[[], None],
) -> list[Callback]:
    """Return the callbacks that keep what is asked for.

    Args:
        keep: What to keep; nothing if None.
        folder: Folder of the cell.
        strategy: The method, freshly built.
        cell: Hash of the cell.
        logits: Whether predictions hold the logits of all classes seen.
        require: Called before a file is written; what it raises keeps the file.

    Raises:
        ValueError: If logits are asked for, but no predictions.
    """
    if logits and keep not in ("predictions", "all"):
        raise ValueError("--keep_logits keeps nothing by itself: add --keep predictions, or --keep all.")
    kept: list[Callback] = []
    if keep in ("model", "all"):
        kept.append(KeptModels(folder, strategy, cell, require))
    if keep in ("predictions", "all"):
        kept.append(KeptPredictions(folder, logits, require))
    return kept


def clear(folder: Path) -> None:
    """Remove what earlier attempts have kept in the folder of a cell."""
    for name in (MODELS, PREDICTIONS):
        shutil.rmtree(folder / name, ignore_errors=True)


def lacking(folder: Path, result: Result, keep: Keep | None, *, logits: bool) -> str | None:
    """Return in words what a finished cell has not kept of what is asked for; None if all of it is there.

    Args:
        folder: Folder of the cell.
        result: Its result.
        keep: What is asked for.
        logits: Whether predictions must hold logits.
    """
    if keep is None:
        return None
    from cl_bench.artifacts import predictions  # imports pandas, which most runs do without

    after = [index for index, row in enumerate(result.rows) if row is not None]
    absent = []
    if keep in ("model", "all") and not all(models.file_of(folder, index).is_file() for index in after):
        absent.append("models")
    if keep in ("predictions", "all"):
        files = [predictions.file_of(folder, index) for index in after]
        if not all(file.is_file() for file in files):
            absent.append("predictions")
        elif logits and not all(predictions.has_logits(file) for file in files):
            absent.append("logits")
    return " and ".join(absent) or None


class _Kept(Callback):
    """What the callbacks share.

    Args:
        folder: Folder of the cell.
        require: Called before a file is written; what it raises keeps the file.
    """

    what: str

    def __init__(self, folder: Path, require: Callable[[], None]) -> None:
        self._folder = folder
        self._require = require
        self._checked = False

    def file_of(self, after: int) -> Path:
        """Return the file of what is kept after experience ``after``."""
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check once that a resumed run has kept what came before.

        Raises:
            ValueError: If not.
        """
        if self._checked:
            return
        self._checked = True
        earlier = range(stream_of(trainer).experience.index)
        if is_first() and not all(self.file_of(index).is_file() for index in earlier):
            raise ValueError(
                f"This run was started without keeping its {self.what}, so it cannot be resumed with them: "
                "drop --keep, or restart with --resume=false."
            )


class KeptModels(_Kept):
    """Keeps the model after every experience, as :mod:`cl_bench.artifacts.models` describes.

    Args:
        folder: Folder of the cell.
        strategy: The method, freshly built.
        cell: Hash of the cell.
        require: Called before a file is written; what it raises keeps the file.
    """

    what = "models"

    def __init__(
        self, folder: Path, strategy: Strategy, cell: str, require: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(folder, require)
        self._cell = cell
        self._pretrained = Pretrained(strategy)
        self._written: int | None = None

    def file_of(self, after: int) -> Path:
        """Return the file of the model after experience ``after``."""
        return models.file_of(self._folder, after)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the model, outside of every phase whose seconds are counted."""
        self._write(trainer, strategy_of(pl_module))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the model of a run that was resumed after training."""
        if self._written != _after(trainer):
            self._write(trainer, strategy_of(pl_module))

    def _write(self, trainer: Trainer, strategy: Strategy) -> None:
        after = self._written = _after(trainer)
        if not is_first():
            return
        class_ = type(strategy)
        path = f"{class_.__module__}.{class_.__qualname__}"
        origin = models.Origin(self._cell, path, strategy.backbone.weights_sha256, after)
        models.write(self.file_of(after), origin, snapshot(strategy, self._pretrained), self._require)


class KeptPredictions(_Kept):
    """Keeps the predictions of every evaluation, as :mod:`cl_bench.artifacts.predictions` describes.

    Args:
        folder: Folder of the cell.
        logits: Whether to keep the logits of all classes seen.
        require: Called before a file is written; what it raises keeps the file.
    """

    what = "predictions"

    def __init__(
        self, folder: Path, logits: bool = False, require: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(folder, require)
        self._logits = logits
        self._batches: list[dict[str, Tensor]] = []

    def file_of(self, after: int) -> Path:
        """Return the file of the predictions after experience ``after``."""
        from cl_bench.artifacts import predictions

        return predictions.file_of(self._folder, after)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start an evaluation."""
        assert isinstance(trainer, StreamTrainer)
        self._experiences = experience_of_class(trainer.result).to(pl_module.device)
        self._batches = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note the predictions of one batch; they stay on the device until the end."""
        found = predicted(outputs, batch[1], self._experiences)
        if len(batch) > 2:
            found["domain"] = batch[2]
        if self._logits:
            found["logits"] = outputs.float()
        self._batches.append(found)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the predictions of all processes.

        Raises:
            OSError: If they cannot be written.
        """
        from cl_bench.artifacts import predictions

        after, batches, self._batches = _after(trainer), self._batches, []
        own = {name: torch.cat([batch[name] for batch in batches]).cpu() for name in batches[0]}
        own["sample"] = _samples(trainer)
        own["after"] = torch.full_like(own["sample"], after)
        shares = of_all(own)
        if is_first():
            columns = {name: torch.cat([share[name] for share in shares]).numpy() for name in own}
            predictions.write(self.file_of(after), columns, self._require)


def predicted(logits: Tensor, labels: Tensor, experiences: Tensor) -> dict[str, Tensor]:
    """Return the columns of a table of predictions that follow from logits (B, C) and labels (B,).

    Args:
        logits: Of the C classes seen.
        labels: The true classes.
        experiences: The experience of each class of the stream.

    >>> columns = predicted(torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([0]), torch.tensor([0, 0, 1]))
    >>> columns["prediction"], columns["within"], columns["top5"]
    (tensor([1]), tensor([1]), tensor([[1, 2, 0]]))
    """
    prediction = logits.argmax(dim=1)
    return {
        "label": labels,
        "experience": experiences[labels],
        "prediction": prediction,
        "predicted_experience": experiences[prediction],
        "within": within_experience(logits, labels, experiences).argmax(dim=1),
        # Of equal logits the first is the prediction, which must also come first here.
        "top5": logits.argsort(dim=1, descending=True, stable=True)[:, :_TOP],
        "probability": logits.float().softmax(dim=1).gather(1, prediction[:, None])[:, 0],
    }


def _samples(trainer: Trainer) -> Tensor:
    """Return the index of every test image that this process has just evaluated, in order."""
    loader = trainer.test_dataloaders
    assert isinstance(loader, StreamLoader)
    batches = zip(loader.batches, loader.batches.sizes, strict=True)
    return torch.tensor([draw.image for batch, size in batches for draw in batch[:size]], dtype=torch.int64)


def _after(trainer: Trainer) -> int:
    """Return the index of the row of the result that the experience at hand fills."""
    assert isinstance(trainer, StreamTrainer)
    return row_of(trainer.result, stream_of(trainer).experience)
