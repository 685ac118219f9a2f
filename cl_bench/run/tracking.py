"""Where curves are logged: always to a CSV file, and to Weights & Biases with ``--wandb``."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from cl_bench.processes.ranks import is_first
from cl_bench.results import dashboard
from cl_bench.results.files import replaced
from cl_bench.results.result import Result
from cl_bench.run.configuration import Configuration

CURVES_NAME = "curves"


@contextmanager
def loggers(
    configuration: Configuration, require: Callable[[], None]
) -> Iterator[tuple[list[Logger], list[Callback]]]:
    """Open the loggers of a cell in its folder, and close them when the run ends, even with an error.

    The callback that they come with resumes the CSV file of an interrupted run. Only the first of several
    processes has loggers and callback.

    Args:
        configuration: The cell.
        require: Called before the CSV file is written; what it raises keeps the file.
    """
    if not is_first():
        yield [], []
        return
    curves = Curves(configuration.folder, configuration.checkpoints.folder, require)
    if not configuration.namespace.wandb:
        yield [curves.logger], [curves]
        return
    with wandb_run(configuration) as run:
        yield [curves.logger, WandbLogger(experiment=run)], [curves]


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
    ``WANDB_MODE`` and ``WANDB_PROJECT`` set mode and project. By default the project is ``cl-bench``, and the
    run is online for users who are logged in and offline for others. An interrupted cell continues its W&B
    run.
    """
    folder = configuration.folder
    return dashboard.opened(
        id=wandb_id(configuration),
        name=f"{folder.parent.name} {folder.name}",
        group=configuration.benchmark,
        job_type=folder.parent.name,
        folder=folder,
        config=configuration.cell,
        resume=configuration.checkpoints.last is not None,
    )


def wandb_id(configuration: Configuration) -> str:
    """Return the id of the W&B run of a cell whose datamodule is set up."""
    folder, identity = configuration.folder, configuration.datamodule.protocol()
    return dashboard.run_id(configuration.benchmark, folder.name, identity)


def record(result: Result, loggers: Iterable[Logger]) -> None:
    """Write the result of a finished run to the summary of its W&B run, where comparisons read it."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            dashboard.record(logger.experiment, result)
