"""Where curves go: a CSV file always, Weights & Biases where it is asked for."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from cl_bench import dashboard
from cl_bench.configuration import Configuration
from cl_bench.results import Result

CURVES_NAME = "curves"


@contextmanager
def loggers(configuration: Configuration) -> Iterator[list[Logger]]:
    """Open the loggers of a cell in its folder, and close them when the run ends, however it ends."""
    folder = configuration.folder
    shutil.rmtree(folder / CURVES_NAME, ignore_errors=True)  # of an earlier attempt at this cell
    csv = CSVLogger(folder, name=CURVES_NAME, version="")
    if not configuration.namespace.wandb:
        yield [csv]
        return
    with wandb_run(configuration) as run:
        yield [csv, WandbLogger(experiment=run)]


def wandb_run(configuration: Configuration) -> wandb.Run:
    """Start the W&B run of a cell: its group is the benchmark, its job type the strategy.

    What is logged once an experience, such as ``stream/*``, has the experience as its step. Mode and project
    are W&B's own ``WANDB_MODE`` and ``WANDB_PROJECT`` where they are set; otherwise the run is online for who
    is logged in and offline for everyone else, in the project ``cl-bench``.
    """
    folder = configuration.folder
    return dashboard.opened(
        id=dashboard.run_id(configuration.benchmark, folder.name),
        name=f"{folder.parent.name} {folder.name}",
        group=configuration.benchmark,
        job_type=folder.parent.name,
        folder=folder,
        config=configuration.cell,
    )


def record(result: Result, loggers: Iterable[Logger]) -> None:
    """Leave the outcome of a finished run where comparisons look for it."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            dashboard.record(logger.experiment, result)
