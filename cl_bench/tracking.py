"""Where curves go: a CSV file always, Weights & Biases where it is asked for."""

from __future__ import annotations

import netrc
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal
from urllib.parse import urlsplit

import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from cl_bench.configuration import Configuration

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
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "cl-bench"),
        name=f"{folder.parent.name} {folder.name}",
        id=f"{folder.parent.name}-{folder.name}",
        group=configuration.benchmark,
        job_type=folder.parent.name,
        dir=folder,
        config=configuration.cell,
        mode=_mode(),
        settings=wandb.Settings(silent=True),
    )
    run.define_metric("trainer/global_step")
    run.define_metric("train/*", step_metric="trainer/global_step")
    run.define_metric("stream/experience")
    for once_an_experience in ("stream/*", "diagnostics/*", "retention/*"):
        run.define_metric(once_an_experience, step_metric="stream/experience")
    return run


def _mode() -> Literal["online", "offline"] | None:
    """Return the mode, or None where the user's own W&B settings say it."""
    settings = wandb.setup().settings
    if "WANDB_MODE" in os.environ or settings.mode != "online":  # online is W&B's default
        return None
    return "online" if settings.api_key or _has_login(settings.base_url) else "offline"


def _has_login(base_url: str) -> bool:
    """Whether ``wandb login`` has left a key for this server."""
    try:
        return netrc.netrc().authenticators(urlsplit(base_url).netloc) is not None
    except FileNotFoundError:
        return False
