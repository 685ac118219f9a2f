"""Where curves are logged: always to a CSV file, on request to Weights & Biases and TensorBoard.

Learning rates and the norm of the gradient are logged only on request, so other runs do not compute them.
"""

from __future__ import annotations

import csv
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import wandb
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch.optim import Optimizer

from cl_bench.artifacts.confusion import confusion_of
from cl_bench.processes.ranks import is_first
from cl_bench.results import dashboard
from cl_bench.results.files import replaced
from cl_bench.results.result import Result
from cl_bench.run.configuration import Configuration

CURVES_NAME = "curves"

TENSORBOARD_NAME = "tensorboard"
"""Folder of TensorBoard's files, in the folder of a cell."""


@contextmanager
def loggers(
    configuration: Configuration, require: Callable[[], None]
) -> Iterator[tuple[list[Logger], list[Callback]]]:
    """Open the loggers of a cell in its folder, and close them when the run ends, even with an error.

    The callbacks that they come with resume the CSV file of an interrupted run, and log what only W&B and
    TensorBoard show. Only the first of several processes has loggers and callbacks.

    Args:
        configuration: The cell.
        require: Called before the CSV file is written; what it raises keeps the file.

    Raises:
        ValueError: If TensorBoard is not installed, or a W&B setting is not valid.
    """
    if not is_first():
        yield [], []
        return
    curves = Curves(configuration.folder, configuration.checkpoints.folder, require)
    opened: list[Logger] = [curves.logger]
    values = configuration.namespace
    watching = [LearningRates(), GradientNorm()] if values.wandb or values.tensorboard else []
    if values.tensorboard:
        opened.append(_tensorboard(configuration.folder))
    if not values.wandb:
        yield opened, [curves, *watching]
        return
    with wandb_run(configuration) as run:
        yield [*opened, WandbLogger(experiment=run)], [curves, *watching]


def _tensorboard(folder: Path) -> Logger:
    try:
        return TensorBoardLogger(folder, name=TENSORBOARD_NAME, version="", default_hp_metric=False)
    except ModuleNotFoundError as error:
        raise ValueError("TensorBoard is not installed: run pip install tensorboard.") from error


class LearningRates(LearningRateMonitor):
    """Lightning's monitor of learning rates, for strategies without an optimizer too."""

    def on_train_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Name the parameter groups of the optimizers."""
        self._has_rates = all("lr" in group for one in trainer.optimizers for group in one.param_groups)
        if self._has_rates:
            super().on_train_start(trainer, *args, **kwargs)

    def _extract_stats(self, trainer: Trainer, interval: str) -> dict[str, float]:
        return super()._extract_stats(trainer, interval) if self._has_rates else {}


class GradientNorm(Callback):
    """Logs ``train/grad_norm``: the Euclidean norm of the gradient of all parameters, before clipping."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Log the norm of this step."""
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        pl_module.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))


class Curves(Callback):
    """The CSV file of a run, and its length at every checkpoint.

    The logger rewrites the file in place, so every checkpoint atomically stores a copy in its folder. When a
    run is resumed, the lines that its checkpoint counts are written again, and later lines are dropped.

    Args:
        folder: Folder of the cell.
        checkpoints: Folder of its checkpoints.
        require: Called before a file is written; what it raises keeps the file.

    Attributes:
        logger: Writes the file.
    """

    def __init__(self, folder: Path, checkpoints: Path, require: Callable[[], None] = lambda: None) -> None:
        self._file = folder / CURVES_NAME / "metrics.csv"
        self._copy = checkpoints / "curves.csv"
        shutil.rmtree(self._file.parent, ignore_errors=True)
        self._require = require
        self.logger = _OwnFile(require, folder, name=CURVES_NAME, version="")

    def state_dict(self) -> dict[str, Any]:
        """Write what is still in memory, and return the number of lines."""
        self.logger.save()
        if not self._file.exists():  # nothing has been logged yet
            return {"lines": 0}
        written = self._file.read_bytes()
        with replaced(self._copy, self._require) as copy:
            copy.write(written)
        return {"lines": written.count(b"\n") - 1}  # without the header

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Write the lines again that the interrupted run had written when the checkpoint was made."""
        self.logger.experiment.metrics[:0] = _lines(self._copy)[: state_dict["lines"]]
        self.logger.save()


class _OwnFile(CSVLogger):
    """A CSV logger that calls a function before every write."""

    def __init__(self, require: Callable[[], None], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._require = require

    def save(self) -> None:
        """Write what is in memory."""
        self._require()
        super().save()


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def wandb_run(configuration: Configuration) -> wandb.Run:
    """Start the W&B run of a cell: its group is the benchmark, its job type the strategy.

    Values that are logged once per experience, such as ``stream/*``, have the experience as their step.
    ``WANDB_MODE`` sets the mode: by default the run is online for users who are logged in, and offline for
    others. An interrupted cell continues its W&B run.

    Raises:
        ValueError: If a tag is not valid.
    """
    folder, values = configuration.folder, configuration.namespace
    return dashboard.opened(
        id=wandb_id(configuration),
        name=values.wandb_name or f"{folder.parent.name} {folder.name}",
        group=values.wandb_group or configuration.benchmark,
        job_type=folder.parent.name,
        folder=folder,
        config=configuration.cell,
        project=values.wandb_project,
        entity=values.wandb_entity,
        tags=values.wandb_tags,
        resume=configuration.checkpoints.last is not None,
    )


def wandb_id(configuration: Configuration) -> str:
    """Return the id of the W&B run of a cell whose datamodule is set up."""
    folder, identity = configuration.folder, configuration.datamodule.protocol()
    return dashboard.run_id(configuration.benchmark, folder.name, identity)


def record(result: Result, loggers: Iterable[Logger], folder: Path) -> None:
    """Write the result of a finished run in ``folder`` to its W&B run, where comparisons read it."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            found = confusion_of(folder)
            dashboard.record(logger.experiment, result, confusions=found.matrices if found else ())


def how_to_read(configurations: Sequence[Configuration]) -> list[str]:
    """Return where the cells have logged for W&B and TensorBoard, and the commands that send and show it."""
    lines: list[str] = []
    offline = [
        folder
        for one in configurations
        if one.namespace.wandb
        for folder in sorted(one.folder.glob("wandb/offline-run-*"))
    ]
    if len(configurations) == 1:
        folders = " ".join(shlex.quote(str(folder)) for folder in offline)
        if offline:
            lines.append(
                f"W&B is offline, and the run is in {offline[-1]}. To send it:\n  wandb sync {folders}"
            )
        if (one := configurations[0]).namespace.tensorboard:
            lines.append(f"  tensorboard --logdir {shlex.quote(str(one.folder / TENSORBOARD_NAME))}")
    elif offline:
        results = shlex.quote(str(configurations[0].results))
        lines.append(
            f"W&B is offline, and {len(offline)} runs are below {results}. To send them:\n"
            f"  wandb sync {results}/*/*/*/wandb/offline-run-*"
        )
    return lines
