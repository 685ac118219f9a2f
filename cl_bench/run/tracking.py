"""Where curves go: a CSV file always, Weights & Biases where it is asked for."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterable, Iterator
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
def loggers(configuration: Configuration) -> Iterator[tuple[list[Logger], list[Callback]]]:
    """Open the loggers of a cell in its folder, and close them when the run ends, however it ends.

    Beside them comes the callback that lets the CSV file go on where an earlier attempt was cut off. Of
    several processes the first alone has any.
    """
    if not is_first():
        yield [], []
        return
    curves = Curves(configuration.folder, configuration.checkpoints.folder)
    if not configuration.namespace.wandb:
        yield [curves.logger], [curves]
        return
    with wandb_run(configuration) as run:
        yield [curves.logger, WandbLogger(experiment=run)], [curves]


class Curves(Callback):
    """The CSV file of a run, of which a checkpoint knows how far it had come.

    With every checkpoint a copy is left beside it, whole or not at all, since the file itself is rewritten in
    place. Of an earlier attempt, what the checkpoint knows of is written again, and the rest is dropped.

    Args:
        folder: Of the cell.
        checkpoints: Folder of its checkpoints.

    Attributes:
        logger: Who writes the file.
    """

    def __init__(self, folder: Path, checkpoints: Path) -> None:
        self._file = folder / CURVES_NAME / "metrics.csv"
        self._copy = checkpoints / "curves.csv"
        shutil.rmtree(self._file.parent, ignore_errors=True)
        self.logger = CSVLogger(folder, name=CURVES_NAME, version="")

    def state_dict(self) -> dict[str, Any]:
        """Write what is still in memory, and return how many lines there are."""
        self.logger.save()
        if not self._file.exists():  # nothing has been logged yet
            return {"lines": 0}
        written = self._file.read_bytes()
        with replaced(self._copy) as copy:
            copy.write(written)
        return {"lines": written.count(b"\n") - 1}  # under their header

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Write again what the earlier attempt had written by then."""
        self.logger.experiment.metrics[:0] = _lines(self._copy)[: state_dict["lines"]]
        self.logger.save()


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def wandb_run(configuration: Configuration) -> wandb.Run:
    """Start the W&B run of a cell: its group is the benchmark, its job type the strategy.

    What is logged once an experience, such as ``stream/*``, has the experience as its step. Mode and project
    are W&B's own ``WANDB_MODE`` and ``WANDB_PROJECT`` where they are set; otherwise the run is online for who
    is logged in and offline for everyone else, in the project ``cl-bench``. A cell that was cut off goes on
    in the run it began.
    """
    folder = configuration.folder
    return dashboard.opened(
        id=dashboard.run_id(configuration.benchmark, folder.name),
        name=f"{folder.parent.name} {folder.name}",
        group=configuration.benchmark,
        job_type=folder.parent.name,
        folder=folder,
        config=configuration.cell,
        resume=configuration.checkpoints.last is not None,
    )


def record(result: Result, loggers: Iterable[Logger]) -> None:
    """Leave the outcome of a finished run where comparisons look for it."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            dashboard.record(logger.experiment, result)
