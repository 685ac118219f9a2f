"""The verb ``predictions``: numbers that need single predictions, from the tables that runs have kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pandas as pd

from cl_bench.artifacts.calibration import expected_calibration_error
from cl_bench.artifacts.confusion import between_classes, between_experiences
from cl_bench.artifacts.predictions import accuracies, mcnemar, read, recency, task_id_accuracy
from cl_bench.errors import visible
from cl_bench.results.escapes import in_csv
from cl_bench.results.files import file_names, replaced
from cl_bench.results.result import FILE_NAME, Result
from cl_bench.results.result import read as read_result


@dataclass(frozen=True, eq=False)
class Cell:
    """A cell with its predictions.

    Attributes:
        name: Its strategy, benchmark and folder.
        result: Its result.
        table: Its predictions.
    """

    name: str
    result: Result
    table: pd.DataFrame


def described(folders: Sequence[Path], output: Path | None = None) -> tuple[str, list[Path]]:
    """Return the numbers of the cells in ``folders`` as text, and the CSV files written into ``output``.

    Raises:
        FileNotFoundError: If a cell has kept no predictions.
        ValueError: If they are not those of its result.
        OSError: If a file cannot be read or written.
    """
    cells = []
    for folder in folders:
        result = read_result(folder / FILE_NAME)
        name = f"{result.strategy} on {result.benchmark}, {folder.resolve().name}"
        cells.append(Cell(name, result, read(folder)))
    parts = [text for cell in cells for text in (cell.name, _over_time(cell.table), _confusion(cell.table))]
    if len(cells) > 1:
        parts.append(_paired(cells))
    files = [] if output is None else _written(cells, output)
    return _visible_lines("\n\n".join(parts)), files


def _visible_lines(text: str) -> str:
    """Return ``text`` with escapes for what a terminal would obey, its lines kept."""
    return "\n".join(visible(line) for line in text.splitlines())


def _over_time(table: pd.DataFrame) -> str:
    """Return the numbers after each experience, in percent."""
    shares = recency(table)
    columns = {
        "accuracy": (table["prediction"] == table["label"]).groupby(table["after"]).mean(),
        "task-id accuracy": task_id_accuracy(table),
        "placed in newest": shares["predicted"],
        "of newest": shares["present"],
        "recency bias": shares["bias"],
        "calibration error": expected_calibration_error(table),
    }
    text: str = _numbered(100 * pd.DataFrame(columns)).to_string(float_format="{:.2f}".format)
    return text


def _confusion(table: pd.DataFrame) -> str:
    """Return the confusion of experiences at the end."""
    after = int(table["after"].max())
    counts = _numbered(_numbered(pd.DataFrame(between_experiences(table, after))).T).T
    return f"images of each experience (rows) by experience of the prediction (columns)\n{counts.to_string()}"


def _numbered(frame: pd.DataFrame) -> pd.DataFrame:
    """Return ``frame`` with its rows numbered from 1, as the console numbers experiences."""
    return frame.set_axis(pd.Index([index + 1 for index in frame.index], name="experience"))


def _paired(cells: Sequence[Cell]) -> str:
    """Return McNemar's test of every pair of cells that are evaluated on the same images."""
    lines = ["McNemar's test on the images of the last evaluation; it compares two models, not two methods"]
    for first, second in combinations(cells, 2):
        pair = f"{first.name} | {second.name}"
        images = [cell.result.protocol.identity.get("test_images") for cell in (first, second)]
        if images[0] != images[1]:
            lines.append(f"{pair}: not compared, since their test images differ")
            continue
        found = mcnemar(first.table, second.table)
        lines.append(
            f"{pair}: only the first is right on {found.only_first}, only the second on {found.only_second}, "
            f"p = {found.p:.2g}"
        )
    return "\n".join(lines)


def _written(cells: Sequence[Cell], output: Path) -> list[Path]:
    """Write CSV files of every cell, and return their paths."""
    names = file_names(cell.name for cell in cells)
    files = []
    for cell in cells:
        labels, table = list(map(in_csv, cell.result.class_names)), cell.table
        after = int(table["after"].max())
        confusion = between_classes(table, after)
        seen = labels[: len(confusion)]
        frames = {
            "classes": _numbered(accuracies(table, "label").rename(columns=dict(enumerate(labels)))),
            "confusion": pd.DataFrame(confusion, index=seen, columns=seen).rename_axis("class"),
        }
        if cell.result.domains:
            domains = dict(enumerate(map(in_csv, cell.result.domains)))
            frames["domains"] = _numbered(accuracies(table, "domain").rename(columns=domains))
        for kind, frame in frames.items():
            path = output / f"{kind}_{names[cell.name]}.csv"
            with replaced(path) as file:
                file.write(frame.to_csv().encode())
            files.append(path)
    return files
