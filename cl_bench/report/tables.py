"""Comparisons as tables: Markdown to be read, CSV to be computed with."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cl_bench.metrics import HIGHER_IS_BETTER
from cl_bench.report.comparison import COSTS, NO_VALUES, RANKING, Comparison, Entry, Statistic
from cl_bench.report.sentences import (
    absences,
    absent,
    compared,
    definitions,
    mixed_provenance,
    protocol_differences,
    unnamed_differences,
)

UNDEFINED = "–"

_COST_HEADINGS = dict(zip(COSTS, ("seconds", "parameters", "stored MB"), strict=True))
_UPPER_BOUND = "†"


@dataclass
class Row:
    """One line of a table: the entries of one label, None on a benchmark where it was not run.

    Attributes:
        label: What the line is called.
        entries: One for each comparison of the table.
    """

    label: str
    entries: list[Entry | None]

    @property
    def is_joint(self) -> bool:
        """Whether the line is an upper bound."""
        return any(entry is not None and entry.is_joint for entry in self.entries)

    def was_run(self, index: int) -> bool:
        """Whether there is a finished run on benchmark ``index``."""
        entry = self.entries[index]
        return entry is not None and bool(entry.runs)

    def statistic(self, index: int, name: str) -> Statistic:
        """Return the statistic called ``name`` on benchmark ``index``."""
        entry = self.entries[index]
        return NO_VALUES if entry is None else entry.statistic(name)

    @property
    def rank(self) -> tuple[bool, list[float], str]:
        """Sort key: joint first, then by falling accuracy on the first benchmark, then the second."""
        means = [self.statistic(index, RANKING).mean for index in range(len(self.entries))]
        return not self.is_joint, [math.inf if math.isnan(mean) else -mean for mean in means], self.label


@dataclass
class Table:
    """Strategies by benchmarks and metrics.

    Attributes:
        comparisons: Benchmarks side by side, each under one protocol.
        metrics: Metrics shown, by name.
        rows: Joint first, then by falling accuracy.
    """

    comparisons: list[Comparison]
    metrics: Sequence[str]
    rows: list[Row]


def tables(comparisons: Sequence[Comparison], metrics: Sequence[str]) -> list[Table]:
    """Lay out ``comparisons``: benchmarks of one protocol side by side, others in tables of their own."""
    together = [comparison for comparison in comparisons if comparison.only_protocol]
    apart = [[comparison] for comparison in comparisons if not comparison.only_protocol]
    return [_table(shown, metrics) for shown in ([together] if together else []) + apart]


def markdown(tables: Sequence[Table]) -> str:
    """Return ``tables`` as one Markdown page, each with what was compared above and its footnotes below."""
    paragraphs = protocol_differences([comparison for table in tables for comparison in table.comparisons])
    for table in tables:
        paragraphs += _section(table)
    return "\n\n".join(paragraphs) + "\n"


def tidy(tables: Sequence[Table]) -> str:
    """Return every statistic of ``tables`` as CSV, one line each: percent, seconds, numbers and megabytes."""
    lines = []
    for entry, comparison, table in _entries(tables):
        for name in (*table.metrics, *COSTS):
            value = entry.statistic(name)
            lines.append(
                [
                    comparison.benchmark,
                    comparison.fingerprint,
                    entry.strategy,
                    entry.label,
                    entry.group,
                    name,
                    _number(value.mean),
                    _number(value.std),
                    value.n,
                ]
            )
    return _csv(
        ["benchmark", "fingerprint", "strategy", "label", "group", "metric", "mean", "std", "n"], lines
    )


def tidy_absences(tables: Sequence[Table]) -> str | None:
    """Return the runs that enter no mean as CSV, one line each; None if there are none."""
    lines = [
        [comparison.benchmark, comparison.fingerprint, run.label, run.seed, run.order, run.status, run.error]
        for table in tables
        for comparison in table.comparisons
        for run in absences(comparison)
    ]
    header = ["benchmark", "fingerprint", "label", "seed", "order", "status", "error"]
    return _csv(header, lines) if lines else None


def _table(comparisons: list[Comparison], metrics: Sequence[str]) -> Table:
    by_label = [{entry.label: entry for entry in comparison.entries} for comparison in comparisons]
    labels = dict.fromkeys(label for entries in by_label for label in entries)
    rows = [Row(label, [entries.get(label) for entries in by_label]) for label in labels]
    return Table(comparisons, metrics, sorted(rows, key=lambda row: row.rank))


def _section(table: Table) -> list[str]:
    paragraphs = [f"## {', '.join(comparison.title for comparison in table.comparisons)}"]
    paragraphs += [compared(comparison) for comparison in table.comparisons]
    paragraphs.append(_grid(table))
    for comparison in table.comparisons:
        paragraphs += _bullets(f"In no mean of {comparison.title}:", absent(comparison))
        paragraphs += _bullets(
            "Further settings in which rows of one name differ:", unnamed_differences(comparison)
        )
    paragraphs.append(_how_to_read(table))
    paragraphs += _bullets("Metrics, in percent:", definitions(table.metrics))
    for comparison in table.comparisons:
        heading = f"Mixed provenance in {comparison.title} (number of runs); seconds may not compare:"
        paragraphs += _bullets(heading, mixed_provenance(comparison))
    return paragraphs


def _how_to_read(table: Table) -> str:
    first = f" on {table.comparisons[0].title}" if len(table.comparisons) > 1 else ""
    sentences = [f"Mean ± sample standard deviation (number of runs); rows by falling {RANKING}{first}."]
    if any(row.is_joint for row in table.rows):
        sentences.append(
            f"{_UPPER_BOUND} Upper bound: trained on all classes at once, so that what happens on the way is "
            f"undefined ({UNDEFINED}). Bold: the best below it."
        )
    else:
        sentences.append("Bold: the best of a column.")
    if len(table.comparisons) > 1:
        sentences.append(
            "A row holds what has one name on every benchmark; other settings may differ by recipe."
        )
    if not all(row.was_run(index) for row in table.rows for index in range(len(table.comparisons))):
        sentences.append("An empty cell has no finished run.")
    sentences.append(
        "Costs are means: seconds of a whole run, parameters trained at once, MB kept at its end."
    )
    return " ".join(sentences)


def _bullets(heading: str, lines: Iterable[str]) -> list[str]:
    listed = "\n".join(f"- {line}" for line in lines)
    return [f"{heading}\n\n{listed}"] if listed else []


def _grid(table: Table) -> str:
    labels = [f"{row.label} {_UPPER_BOUND}" if row.is_joint else row.label for row in table.rows]
    columns = [["strategy", *(label.replace("|", "\\|") for label in labels)]]
    alone = len(table.comparisons) == 1
    for index, comparison in enumerate(table.comparisons):
        prefix = "" if alone else f"{comparison.title} "
        columns += [[prefix + name, *_metric_cells(table.rows, index, name)] for name in table.metrics]
    for index, comparison in enumerate(table.comparisons):
        prefix = "" if alone else f"{comparison.title} "
        columns += [[prefix + _COST_HEADINGS[name], *_cost_cells(table.rows, index, name)] for name in COSTS]
    return _aligned(columns)


def _metric_cells(rows: Sequence[Row], index: int, name: str) -> list[str]:
    means = [row.statistic(index, name).mean for row in rows if not row.is_joint]
    defined = [mean for mean in means if not math.isnan(mean)]
    best = (max if HIGHER_IS_BETTER[name] else min)(defined, default=math.nan)
    cells = []
    for row in rows:
        value = row.statistic(index, name)
        text = _percent(value) if row.was_run(index) else ""
        # Equal as printed is equal: bold may not hang on a digit that nobody sees.
        wins = not row.is_joint and round(value.mean, 2) == round(best, 2)
        cells.append(f"**{text}**" if wins else text)
    return cells


def _cost_cells(rows: Sequence[Row], index: int, name: str) -> list[str]:
    return [_quantity(row.statistic(index, name).mean) if row.was_run(index) else "" for row in rows]


def _percent(value: Statistic) -> str:
    if value.n == 0:
        return UNDEFINED
    deviation = "" if value.n == 1 else f" ± {value.std:.2f}"
    return f"{value.mean:.2f}{deviation} ({value.n})"


def _quantity(value: float) -> str:
    if math.isnan(value):
        return UNDEFINED
    return f"{value:,.0f}" if value >= 100 or value.is_integer() else f"{value:.3g}"


def _aligned(columns: Sequence[Sequence[str]]) -> str:
    """Lay out columns as a Markdown table whose source is aligned too: it is printed as it is."""
    widths = [max(map(len, column)) for column in columns]
    justify: list[Callable[[str, int], str]] = [str.ljust, *[str.rjust] * (len(columns) - 1)]
    lines = [
        [pad(cell, width) for pad, cell, width in zip(justify, cells, widths, strict=True)]
        for cells in zip(*columns, strict=True)
    ]
    rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [lines[0], rule, *lines[1:]])


def _entries(tables: Sequence[Table]) -> Iterable[tuple[Entry, Comparison, Table]]:
    for table in tables:
        for comparison in table.comparisons:
            for entry in comparison.entries:
                yield entry, comparison, table


def _number(value: float) -> float | str:
    return "" if math.isnan(value) else round(value, 6)


def _csv(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return text.getvalue()
