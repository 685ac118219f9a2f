"""The contents of a W&B run of one result, logged while training or rebuilt from a file.

Config, curves, summary and accuracy matrix have the same names in both, so runs of either kind can be
compared without manual work. Nothing here needs torch or Lightning.

* config: the resolved config of the cell, plus ``label``, ``benchmark``, ``fingerprint``, ``cell``,
  ``status`` and ``protocol``, by which runs are filtered and grouped.
* ``stream/*``: every metric after every experience, with the experience as its step.
* ``train/*`` and ``lr-*``: loss, norm of the gradient and learning rates, only of runs logged while training.
* summary: ``final/*``, every metric of the whole stream, and ``cost/*``.
* ``accuracy_matrix``: a table with a row for each evaluation, and the same as a picture. So are confusions of
  cells that have kept their predictions.
"""

from __future__ import annotations

import math
import netrc
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import wandb
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cl_bench.errors import visible
from cl_bench.results.files import file_name
from cl_bench.results.metrics import Matrix, accuracy_matrix
from cl_bench.results.result import Result, digest

Counts = npt.NDArray[np.int64]

PROJECT = "cl-bench"
"""Project of runs for which no project is given."""

MATRIX = "accuracy_matrix"
"""Name of the table that holds the accuracy matrix."""

CONFUSIONS = ("confusion_experiences", "confusion_classes")
"""Names of the confusions of kept predictions, between experiences and between classes."""

PICTURE = "_picture"
"""End of the name of a matrix as a picture."""

_LONGEST = 128  # characters of a name on W&B
_LONGEST_TAG = 64


def run_id(benchmark: str, cell_folder: str, identity: Mapping[str, Any]) -> str:
    """Return the id of a run, which depends only on its cell and its images.

    It is the same whether the run is logged live or rebuilt from its file.

    Args:
        benchmark: Dataset and number of experiences, such as ``digits-T5``.
        cell_folder: Name of the folder of the cell.
        identity: The identity of its protocol, with the hashes of its images.
    """
    images = digest([identity.get("train_images"), identity.get("test_images")])
    return file_name(f"{benchmark}-{cell_folder}-{images}")  # W&B makes a folder of this name


def cell_folder(result: Result) -> str:
    """Return the name of the folder that holds the result of this cell."""
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
    tags: Sequence[str] = (),
    resume: bool = False,
) -> wandb.Run:
    """Start a W&B run below ``folder``, with the experience as the step of ``stream/*``.

    With ``resume``, an existing run of this id is resumed instead of replaced.

    Raises:
        ValueError: If a tag is empty, or longer than W&B allows.
    """
    for tag in tags:
        if not 1 <= len(tag) <= _LONGEST_TAG:
            raise ValueError(f"{tag!r} is not a tag of W&B: write 1 to {_LONGEST_TAG} characters.")
    run = wandb.init(
        project=project or os.environ.get("WANDB_PROJECT", PROJECT),
        entity=entity,
        name=_shown(name),
        id=id,
        resume="allow" if resume else None,
        group=_shown(group),
        tags=list(tags),
        job_type=_shown(job_type),
        dir=folder,
        config=dict(config),
        mode=mode(),
        settings=wandb.Settings(silent=True),
    )
    run.define_metric("trainer/global_step")
    for once_a_step in ("train/*", "lr-*"):
        run.define_metric(once_a_step, step_metric="trainer/global_step")
    run.define_metric("stream/experience")
    for once_an_experience in ("stream/*", "diagnostics/*", "retention/*"):
        run.define_metric(once_an_experience, step_metric="stream/experience")
    return run


def _shown(name: str) -> str:
    return visible(name)[:_LONGEST]


def record(
    run: wandb.Run, result: Result, label: str | None = None, confusions: Sequence[Counts] = ()
) -> None:
    """Write to ``run`` the config entries to filter by, the final metrics and costs, and the accuracy matrix.

    Args:
        run: An open run.
        result: The result of the run.
        label: Its name in tables; None for the name of its strategy.
        confusions: Numbers of images, truth in rows and prediction in columns: between experiences, and
            between classes if they are few; none if the run has kept no predictions.
    """
    run.config.update(identification(result, label), allow_val_change=True)
    run.summary.update(summary(result))
    R = accuracy_matrix(result.counts("correct"), result.totals)
    _log_matrix(run, MATRIX, R, ("after", "on", "accuracy"))
    for name, counts in zip(CONFUSIONS, confusions, strict=False):
        _log_matrix(run, name, counts.astype(float), ("truth", "prediction", "images"))


def _log_matrix(run: wandb.Run, name: str, matrix: Matrix, columns: tuple[str, str, str]) -> None:
    lines = entries(matrix)
    if lines:
        picture = wandb.Image(_picture(matrix, columns))
        run.log({name: wandb.Table(columns=list(columns), data=lines), name + PICTURE: picture})


def _picture(matrix: Matrix, columns: tuple[str, str, str]) -> Any:
    """Return ``matrix`` as an array of pixels, its rows and columns numbered from 1."""
    figure = Figure(figsize=(4.5, 4.0), layout="constrained")
    axes = figure.add_subplot()
    height, width = matrix.shape
    shown = axes.imshow(matrix, extent=(0.5, width + 0.5, height + 0.5, 0.5), interpolation="nearest")
    axes.set_xlabel(columns[1])
    axes.set_ylabel(columns[0])
    figure.colorbar(shown, label=columns[2])
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def identification(result: Result, label: str | None = None) -> dict[str, Any]:
    """Return the config entries by which runs are filtered, grouped and distinguished."""
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
    """Yield for every evaluated experience the metrics that are defined by then, in percent."""
    for i, row in enumerate(result.rows):
        if row is not None:
            values = result.metrics_after(i)
            yield {"stream/experience": i + 1.0} | {
                f"stream/{name}": value for name, value in values.items() if not math.isnan(value)
            }


def summary(result: Result) -> dict[str, float]:
    """Return the metrics and costs of the whole stream that are defined."""
    values = {f"final/{name}": value for name, value in result.metrics().items()}
    values |= {f"cost/{name}": value for name, value in result.spending().items()}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def entries(matrix: Matrix) -> list[list[float]]:
    """Return the entries of ``matrix`` that are not NaN as lines: row, column (both from 1), value.

    >>> entries(np.array([[90.0, math.nan], [50.0, 80.0]]))
    [[1.0, 1.0, 90.0], [2.0, 1.0, 50.0], [2.0, 2.0, 80.0]]
    """
    return [[float(i + 1), float(j + 1), float(matrix[i, j])] for i, j in np.argwhere(~np.isnan(matrix))]


def mode() -> Literal["online", "offline"] | None:
    """Return the mode to start W&B in, or None if the user's settings already choose one."""
    settings = wandb.setup().settings
    if "WANDB_MODE" in os.environ or settings.mode != "online":  # the default
        return None
    return "online" if settings.api_key or _has_login(settings.base_url) else "offline"


def _has_login(base_url: str) -> bool:
    """Return whether the netrc file, named by ``NETRC`` or in the home folder, has a key for this server.

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
            f"{error.filename}, line {error.lineno}, is not a netrc file ({error.msg}): correct "
            "that line, or set WANDB_MODE."
        ) from error
    return found.authenticators(urlsplit(base_url).netloc) is not None
