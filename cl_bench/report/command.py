"""The verb ``report``: read result files, and write tables, pictures or one page."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cl_bench.artifacts.confusion import confusions_below
from cl_bench.errors import suggestion, visible
from cl_bench.report.comparison import Comparison, Entry, comparisons
from cl_bench.report.page import page
from cl_bench.report.pictures import PICTURES, pictures
from cl_bench.report.pictures.figures import DEFAULT, Style
from cl_bench.report.ranking import Columns, described
from cl_bench.report.records import tidy, tidy_absences, tidy_differences, tree
from cl_bench.report.tables import Table, tables
from cl_bench.report.text import latex, markdown
from cl_bench.report.tuning.pictures import TUNING
from cl_bench.results.files import file_names
from cl_bench.results.metrics import DEFINITIONS
from cl_bench.results.result import FILE_NAME, Result, read_all, without_collector

Format = Literal["md", "latex", "csv", "json", "html"]

FORMATS: tuple[Format, ...] = get_args(Format)
"""Formats of a report."""

METRICS = ("acc/sample", "maa/sample", "bwt/gem", "forgetting/chaudhry")
"""Metrics shown by default."""

FOLDER = "report"
"""Name of the folder of reports, inside the results folder."""

PAGE = "page.html"
"""Name of the page, in that folder."""

_LISTED = 8  # files in one sentence

_ENDINGS: dict[Format, tuple[str, ...]] = {"md": ("png",), "latex": ("pdf", "svg")}  # of pictures

_OURS: dict[Format, tuple[str, ...]] = {
    "md": ("table.md", *(f"{kind}_*.png" for kind in PICTURES | TUNING)),
    "latex": ("table.tex", *(f"{kind}_*.{end}" for kind in PICTURES | TUNING for end in ("pdf", "svg"))),
    "csv": ("table.csv", "absent.csv", "differences.csv"),
    "json": ("table.json",),
    "html": (PAGE,),
}


@dataclass(frozen=True)
class Report:
    """What a report has written.

    Attributes:
        text: The tables as text; for a page, one sentence about it.
        files: Paths written: tables first, then pictures.
        notices: A sentence for each file that could not be read and each picture that could not be drawn.
    """

    text: str
    files: list[Path]
    notices: list[str]


def report(
    results_folder: Path,
    format: Format,  # noqa: A002
    metrics: Sequence[str] | None = None,
    style: Style = DEFAULT,
    published: Columns | None = None,
) -> Report:
    """Read every result below ``results_folder`` and write tables and pictures into its folder ``report``.

    Means are over finished runs; the other runs are listed. Results of unequal protocols never share a table.
    An earlier report in the same format is replaced; reports in other formats stay.

    Args:
        results_folder: Folder that holds result files, at any depth.
        format: ``md`` for Markdown, ``latex`` for a paper, ``csv`` for one statistic a line, ``json`` for one
            tree of everything, ``html`` for one page that opens from disk. ``md`` also writes pictures as
            PNG, and ``latex`` as PDF and SVG.
        metrics: Names of the metrics shown, as in :data:`cl_bench.results.metrics.DEFINITIONS`; None for
            ``METRICS``.
        style: Width and font of the pictures.
        published: Columns of a published table; the rank correlation of every comparison with them follows
            the Markdown tables, and is a notice of the other formats.

    Raises:
        FileNotFoundError: If the folder does not exist, or has no result that can be read.
        ValueError: If a metric has no definition, the published table is unknown or shares too few methods
            with every comparison, or the folder of the report is a link.
    """
    shown = defined(METRICS if metrics is None else metrics)
    with without_collector():
        results, unreadable = results_below(results_folder)
        compared = comparisons(results)
        unreadable += with_confusions(compared, results_folder)
        laid_out = tables(compared, shown)
        texts = _texts(laid_out, format, results_folder.resolve().name, unreadable)
        ranked = _ranked(compared, published) if published else []
        if format == "md":
            texts["table.md"] += "".join(f"\n{paragraph}\n" for paragraph in ranked)
            ranked = []
    folder = results_folder / FOLDER
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link to another folder: remove it, and the report makes its own.")
    folder.mkdir(exist_ok=True)
    for pattern in _OURS[format]:  # no picture of results that are gone may remain with the new table
        for path in folder.glob(pattern):
            path.unlink()
    files = [folder / name for name in texts]
    for path, text in zip(files, texts.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    notices = [*(f"Not read: {line}" for line in unreadable), *ranked]
    if format in _ENDINGS:
        names = file_names(comparison.title for comparison in compared)
        for comparison, kinds in itertools.product(compared, (None, TUNING)):
            name = names[comparison.title]
            drawn, failed = pictures(comparison, folder, name, style, _ENDINGS[format], kinds)
            files += drawn
            notices += failed
    text = (
        f"Open {visible(str(files[0]))} in a browser.\n" if format == "html" else next(iter(texts.values()))
    )
    return Report(text, files, notices)


def results_below(folder: Path) -> tuple[list[Result], list[str]]:
    """Return every result below ``folder``, and a sentence for each file that cannot be read.

    Raises:
        FileNotFoundError: If the folder does not exist, or has no result that can be read.
    """
    results, unreadable = read_all(folder)
    if not results:
        listed = (
            unreadable
            if len(unreadable) <= _LISTED
            else [*unreadable[:_LISTED], f"{len(unreadable) - _LISTED} more cannot be read either."]
        )
        reasons = "".join(f" {line}" for line in listed)
        raise FileNotFoundError(
            f"No {FILE_NAME} below {folder} can be read: run a cell first, or name another folder.{reasons}"
        )
    return results, unreadable


def with_confusions(compared: Sequence[Comparison], folder: Path) -> list[str]:
    """Add to ``compared`` the confusions of the cells below ``folder`` that have kept predictions.

    Return a sentence for each cell whose predictions cannot be read.
    """
    unreadable: list[str] = []
    entries: dict[tuple[str, str, str], Entry] = {}
    for found in confusions_below(folder):
        if isinstance(found, str):
            unreadable.append(found)
            continue
        entries = entries or _by_cell(compared)
        result = found.result
        entry = entries.pop((result.benchmark, result.protocol.fingerprint, result.cell), None)
        if entry is not None:  # a copy of a cell is not a second sample
            entry.confusions.append(found)
    return unreadable


def _by_cell(compared: Sequence[Comparison]) -> dict[tuple[str, str, str], Entry]:
    """Return the entry of every finished run by its benchmark, protocol and cell."""
    return {
        (comparison.benchmark, comparison.fingerprint, run.cell): entry
        for comparison in compared
        for entry in comparison.entries
        for run in entry.runs
    }


def defined(metrics: Sequence[str]) -> list[str]:
    """Return ``metrics`` without duplicates.

    Raises:
        ValueError: If one of them has no definition.
    """
    for name in metrics:
        if name not in DEFINITIONS:
            raise ValueError(f"There is no metric {name!r}. {suggestion(name, DEFINITIONS)}")
    return list(dict.fromkeys(metrics))


def _ranked(compared: Sequence[Comparison], published: Columns) -> list[str]:
    """Return, for each comparison, its correlation with a published table, or why it has none.

    Raises:
        ValueError: If no comparison has one.
    """
    lines, errors = [], []
    for comparison in compared:
        try:
            lines.append(described(comparison, published))
        except ValueError as error:
            errors.append(error)
            lines.append(f"No rank correlation of {comparison.title}: {error}")
    if len(errors) == len(compared):
        raise errors[0]
    return lines


def _texts(
    laid_out: Sequence[Table],
    format: Format,  # noqa: A002
    title: str,
    unreadable: Sequence[str],
) -> dict[str, str]:
    """Return the report by file name; CSV has separate files for differences and for runs in no mean."""
    if format == "html":
        return {PAGE: page(laid_out, title, unreadable)}
    if format == "md":
        return {"table.md": markdown(laid_out)}
    if format == "latex":
        return {"table.tex": latex(laid_out)}
    if format == "json":
        return {"table.json": tree(laid_out)}
    further = {"differences.csv": tidy_differences(laid_out), "absent.csv": tidy_absences(laid_out)}
    return {"table.csv": tidy(laid_out)} | {name: text for name, text in further.items() if text}
