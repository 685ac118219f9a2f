"""What a W&B run of one result holds, whether it is logged while training or rebuilt from a file.

Config, curves, summary and accuracy matrix have the same names in both, so that runs of either kind stand in
one comparison without any work by hand. Nothing here needs torch or Lightning.

* config: the resolved config of the cell, and beside it ``label``, ``benchmark``, ``fingerprint``, ``cell``,
  ``status`` and ``protocol``, by which runs are filtered and grouped.
* ``stream/*``: every metric after every experience, with the experience as its step.
* summary: ``final/*``, every metric of the whole stream, and ``cost/*``.
* ``accuracy_matrix``: a table, one evaluation a line.
"""

from __future__ import annotations

import math
import netrc
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import wandb

from cl_bench.results.metrics import accuracy_matrix
from cl_bench.results.result import Result

PROJECT = "cl-bench"
"""Project of runs that name none."""

MATRIX = "accuracy_matrix"
"""Name of the table of an accuracy matrix."""


def run_id(benchmark: str, cell_folder: str) -> str:
    """Return the id of a run: the same cell has the same one, logged live or rebuilt from its file."""
    return f"{benchmark}-{cell_folder}"


def cell_folder(result: Result) -> str:
    """Return the name of the folder in which a run of this cell leaves its result."""
    return f"{result.order}-seed{result.seed}-{result.cell}"


def opened(
    *,
    id: str,  # noqa: A002
    name: str,
    group: str,
    job_type: str,
    folder: Path,
    config: Mapping[str, Any],
    project: str | None = None,
    entity: str | None = None,
    goes_on: bool = False,
) -> wandb.Run:
    """Start a W&B run whose ``stream/*`` have the experience as their step, below ``folder``.

    Where ``goes_on``, a run of this id that is there already is gone on with, not replaced.
    """
    run = wandb.init(
        project=project or os.environ.get("WANDB_PROJECT", PROJECT),
        entity=entity,
        name=name,
        id=id,
        resume="allow" if goes_on else None,
        group=group,
        job_type=job_type,
        dir=folder,
        config=dict(config),
        mode=mode(),
        settings=wandb.Settings(silent=True),
    )
    run.define_metric("trainer/global_step")
    run.define_metric("train/*", step_metric="trainer/global_step")
    run.define_metric("stream/experience")
    for once_an_experience in ("stream/*", "diagnostics/*", "retention/*"):
        run.define_metric(once_an_experience, step_metric="stream/experience")
    return run


def record(run: wandb.Run, result: Result, label: str | None = None) -> None:
    """Put into ``run`` by what it is compared, how it ended, and its accuracy matrix.

    Args:
        run: An open run.
        result: What the run left.
        label: What tables call it, if not the name of its strategy.
    """
    run.config.update(identification(result, label), allow_val_change=True)
    run.summary.update(summary(result))
    lines = matrix(result)
    if lines:
        run.log({MATRIX: wandb.Table(columns=["after", "on", "accuracy"], data=lines)})


def identification(result: Result, label: str | None = None) -> dict[str, Any]:
    """Return the entries of the config by which runs are filtered, grouped and told apart."""
    return {
        "label": label or result.strategy,
        "benchmark": result.benchmark,
        "fingerprint": result.protocol.fingerprint,
        "cell": result.cell,
        "regime": result.regime,
        "status": result.status,
        "protocol": result.protocol.identity,
        "provenance": result.provenance,
    }


def curves(result: Result) -> Iterator[dict[str, float]]:
    """Yield what is logged once an experience: every metric that is defined by then, in percent."""
    for i, row in enumerate(result.rows):
        if row is not None:
            values = result.metrics_after(i)
            yield {"stream/experience": i + 1.0} | {
                f"stream/{name}": value for name, value in values.items() if not math.isnan(value)
            }


def summary(result: Result) -> dict[str, float]:
    """Return the metrics of the whole stream and its costs, those that are defined."""
    values = {f"final/{name}": value for name, value in result.metrics().items()}
    values |= {f"cost/{name}": value for name, value in result.spending().items()}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def matrix(result: Result) -> list[list[float]]:
    """Return the accuracy matrix as lines: after which experience, on which, both from 1, in percent."""
    R = accuracy_matrix(result.counts("correct"), result.totals)
    return [[float(i + 1), float(j + 1), float(R[i, j])] for i, j in np.argwhere(~np.isnan(R))]


def mode() -> Literal["online", "offline"] | None:
    """Return W&B's mode, or None where the user's own settings say it."""
    settings = wandb.setup().settings
    if "WANDB_MODE" in os.environ or settings.mode != "online":  # online is W&B's default
        return None
    return "online" if settings.api_key or _has_login(settings.base_url) else "offline"


def _has_login(base_url: str) -> bool:
    """Whether ``wandb login`` has left a key for this server, in the file that ``NETRC`` names or at home.

    Raises:
        ValueError: If that file cannot be parsed.
    """
    named = os.environ.get("NETRC")
    try:
        found = netrc.netrc(Path(named).expanduser() if named else None)
    except FileNotFoundError:
        return False
    except netrc.NetrcParseError as error:
        raise ValueError(
            f"{error.filename}, line {error.lineno}, is no netrc file ({error.msg}): mend that line, or set "
            "WANDB_MODE."
        ) from error
    return found.authenticators(urlsplit(base_url).netloc) is not None
