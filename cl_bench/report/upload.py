"""A comparison on Weights & Biases: runs rebuilt from result files, and a view for each benchmark as code.

A view shows the runs of one benchmark under one protocol and groups them as the tables do, so its means and
bands are over seeds and class orders. One more view has all benchmarks at once. Only the report has tests and
intervals, which W&B does not offer: its tables and page are an artifact of a run of their own.

Without a login, or with ``WANDB_MODE=offline``, everything is written to disk instead: runs become offline
W&B runs, views JSON files.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wandb

from cl_bench.artifacts.confusion import Confusion
from cl_bench.errors import visible
from cl_bench.report.command import with_confusions
from cl_bench.report.comparison import Comparison, comparisons
from cl_bench.report.tables import counted
from cl_bench.results import dashboard
from cl_bench.results.files import file_name
from cl_bench.results.result import Result, digest

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

FOLDER = "wandb"
"""Name of the folder of offline runs and views, inside the folder of a report."""

VIEWS = "views.json"
"""Name of the file of views, in that folder."""

_MEAN: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}  # over the runs of a group


@dataclass(frozen=True)
class Uploaded:
    """The runs and views that were sent or written.

    Attributes:
        text: What was written or sent, and what to do next.
        views: The views in W&B's format.
        runs: Folders of offline runs; empty if the runs were sent.
    """

    text: str
    views: list[dict[str, Any]]
    runs: list[Path]


def upload(
    results: Sequence[Result],
    project: str,
    folder: Path,
    metrics: Sequence[str],
    files: Sequence[Path] = (),
) -> Uploaded:
    """Send ``results`` to ``project`` with a view for each benchmark, or write both below ``folder``.

    A run that exists already, sent before or logged while training, keeps its curves; its summary and config
    are updated.

    Args:
        results: Runs, finished or not.
        project: Name of the W&B project; ``ENTITY/PROJECT`` for an entity other than the user's.
        folder: Folder of the report.
        metrics: Metrics in the views, the most important first.
        files: Tables, pictures and page, which become an artifact.

    Raises:
        ValueError: If the package wandb-workspaces is not installed, or ``project`` is not a project.
    """
    entity, name = _project(project)
    compared = comparisons(results)
    with_confusions(compared, folder.parent)
    views = [_view(comparison, entity, name, metrics) for comparison in compared]
    if len(compared) > 1:
        views.append(_view_of_all(entity, name, metrics))
    home = folder / FOLDER
    shutil.rmtree(home, ignore_errors=True)  # offline runs of an earlier report would be sent twice
    home.mkdir(parents=True)
    ids = Counter(_id(result) for comparison in compared for result in comparison.results)
    offline = False
    for comparison in compared:
        for entry in comparison.entries:
            for result in (*entry.runs, *entry.unfinished):
                # A cell under two protocols, for instance after the data changed, is two runs.
                suffix = f"-{comparison.fingerprint}" if ids[_id(result)] > 1 else ""
                found = next((one for one in entry.confusions if one.result.cell == result.cell), None)
                offline |= _sent(result, _id(result) + suffix, entry.label, project, home, found)
    if files:
        _send_files(files, project, home)
    specifications = [view._spec for view in views]
    (home / VIEWS).write_text(json.dumps(specifications, indent=1) + "\n", encoding="utf-8")
    number = sum(len(comparison.results) for comparison in compared)
    if offline:
        return Uploaded(
            _how_to_sync(number, home, project), specifications, sorted(home.glob("wandb/*run-*"))
        )
    for view in views:
        view.save()
    links = "".join(f"\n  {view.display_name}: {view.url}" for view in views)
    return Uploaded(f"{counted(number, 'run')} in {project}; views:{links}", specifications, [])


def _project(project: str) -> tuple[str | None, str]:
    entity, _, name = project.rpartition("/")
    if not name or "/" in entity:
        raise ValueError(f"{project!r} is not a W&B project: give a name, or ENTITY/PROJECT.")
    return entity or None, name


def _id(result: Result) -> str:
    return dashboard.run_id(result.benchmark, dashboard.cell_folder(result), result.protocol.identity)


def _sent(
    result: Result,
    id: str,  # noqa: A002
    label: str,
    project: str,
    folder: Path,
    confusion: Confusion | None,
) -> bool:
    """Rebuild the W&B run of ``result`` and return whether it is offline."""
    entity, name = _project(project)
    with dashboard.opened(
        id=id,
        name=f"{label} {dashboard.cell_folder(result)}",
        group=result.benchmark,
        job_type=label,
        folder=folder,
        config=result.config,
        project=name,
        entity=entity,
        resume=True,
    ) as run:
        if not run.resumed:
            for values in dashboard.curves(result):
                run.log(values)
        dashboard.record(run, result, label, confusion.matrices if confusion else ())
        return run.offline


def _send_files(files: Sequence[Path], project: str, folder: Path) -> None:
    """Make an artifact of ``files``, in a run that has the same id in every call for the same report."""
    entity, name = _project(project)
    place = folder.resolve().parents[1]  # the folder of all results
    with dashboard.opened(
        id=file_name(f"report-{place.name}-{digest(str(place))}"),
        name=f"report of {place.name}",
        group="report",
        job_type="report",
        folder=folder,
        config={},
        project=name,
        entity=entity,
        resume=True,
    ) as run:
        artifact = wandb.Artifact(file_name(place.name), type="report")
        for file in files:
            artifact.add_file(str(file))
        run.log_artifact(artifact)


def _view(comparison: Comparison, entity: str | None, project: str, metrics: Sequence[str]) -> Workspace:
    panels, workspaces = _workspaces()
    curves = [
        panels.LinePlot(
            title=f"{name} after each experience", x="stream/experience", y=[f"stream/{name}"], **_MEAN
        )
        for name in metrics
    ]
    first = panels.SummaryMetric(f"final/{metrics[0]}")
    costs = [
        panels.ScatterPlot(
            title=f"{metrics[0]} against {name}", x=panels.SummaryMetric(f"cost/{name}"), y=first
        )
        for name in ("seconds", "peak_megabytes", "trainable_parameters", "stored_megabytes")
    ]
    why = panels.ScatterPlot(
        title="why a method loses",
        x=panels.SummaryMetric("final/task_id/sample"),
        y=panels.SummaryMetric("final/within/sample"),
    )
    step = {"x": "trainer/global_step"} | _MEAN
    steps = [
        panels.LinePlot(title="training loss", y=["train/loss_step"], **step),
        panels.LinePlot(title="norm of the gradient", y=["train/grad_norm"], **step),
        panels.LinePlot(title="learning rate", metric_regex="lr-.*", **step),
    ]
    names = [dashboard.MATRIX, *dashboard.CONFUSIONS]
    pictures = [panels.MediaBrowser(media_keys=[name + dashboard.PICTURE]) for name in names]
    return _workspace(
        entity,
        project,
        f"{comparison.benchmark}, protocol {comparison.fingerprint}",
        {
            "Final": [*_bars(metrics), why],
            "Curves": curves,
            "Accuracy against cost": costs,
            "Training": steps,
            "Matrices": pictures,
        },
        [
            workspaces.Config("benchmark") == comparison.benchmark,
            workspaces.Config("fingerprint") == comparison.fingerprint,
        ],
        ["label"],
    )


def _view_of_all(entity: str | None, project: str, metrics: Sequence[str]) -> Workspace:
    """Return the view that compares strategies and benchmarks at once: a bar for every pair."""
    groups = ["benchmark", "fingerprint", "label"]
    return _workspace(entity, project, "all benchmarks", {"Final": _bars(metrics)}, [], groups)


def _bars(metrics: Sequence[str]) -> list[Any]:
    panels, _ = _workspaces()
    return [panels.BarPlot(title=f"final {name}", metrics=[f"final/{name}"], **_MEAN) for name in metrics]


def _workspaces() -> tuple[Any, Any]:
    """Return the two modules of wandb-workspaces that views are made of."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ValueError(
            "A view on W&B needs the package wandb-workspaces: pip install 'cl-bench[wandb]'."
        ) from error
    return panels, workspaces


def _workspace(
    entity: str | None,
    project: str,
    name: str,
    sections: Mapping[str, Sequence[Any]],
    filters: Sequence[Any],
    groups: Sequence[str],
) -> Workspace:
    """Return a view of the finished runs that ``filters`` leave, grouped by entries of their config."""
    _, workspaces = _workspaces()
    made: Workspace = workspaces.Workspace(
        entity=entity or _own_entity(),
        project=project,
        name=visible(name),
        auto_generate_panels=False,
        sections=[
            workspaces.Section(name=title, panels=shown, is_open=True) for title, shown in sections.items()
        ],
        runset_settings=workspaces.RunsetSettings(
            filters=workspaces.And(*filters, workspaces.Config("status") == "done"),
            groupby=[workspaces.Config(group) for group in groups],
        ),
    )
    return made


def _own_entity() -> str:
    """Return the entity of the logged-in user; it may be empty offline, because the view is not sent."""
    settings = wandb.setup().settings
    if dashboard.mode() == "offline" or settings.mode != "online":
        return settings.entity or ""
    return settings.entity or wandb.Api().default_entity or ""


def _how_to_sync(number: int, home: Path, project: str) -> str:
    return (
        f"Offline: nothing was sent. {counted(number, 'run')} and their views are in {home}. To send them:\n"
        "  wandb login\n"
        f"  wandb sync {home}/wandb/offline-run-*\n"
        "Then run this command again to send the views; runs that were sent before are only updated.\n"
        f"They will be at {project}."
    )
