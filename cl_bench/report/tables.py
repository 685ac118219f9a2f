"""Comparisons laid out as tables: which line, which column, which value is best, in no format yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from cl_bench.report.comparison import RANKING, Comparison, Entry, contrasts
from cl_bench.report.statistics import NO_VALUES, Contrast, Statistic, against, corrected
from cl_bench.results.metrics import HIGHER_IS_BETTER
from cl_bench.results.result import COSTS, PHASES, digest

UNDEFINED = "–"
"""What a cell says of a metric that does not exist, or a cost that was not measured."""

UPPER_BOUND = "†"
"""Mark of a line that was trained on all classes at once."""

INCOMPLETE = "What lacks seeds or class orders that another line finished is not ranked."
"""What a table says where such a line has no mark."""

NOT_RUN = "not run"
"""What a cell says where a line has no result file at all."""

COST_HEADINGS = dict(
    zip(
        COSTS,
        (
            "seconds",
            *(phase.replace("_", " ") for phase in PHASES),
            "peak MB",
            "parameters",
            "stored MB",
        ),
        strict=True,
    )
)
"""What tables call a cost."""

SHORT_NAMES = {
    "acc/sample": "ACC",
    "acc/experience": "ACC (exp.)",
    "maa/sample": "MAA",
    "maa/experience": "MAA (exp.)",
    "bwt/gem": "BWT",
    "forgetting/chaudhry": "Forgetting",
}
"""What narrow columns call a metric; its definition stands below."""

_MOST_PAIRS = 15  # pairs in a table to be read; of more entries, those against the best


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

    def status(self, index: int) -> str:
        """Say why there is no finished run on benchmark ``index``; empty if there is one.

        What became of the runs that there are: ``failed``, ``diverged``, ``running``, ``disagreeing``.
        """
        entry = self.entries[index]
        if entry is None:
            return NOT_RUN
        if entry.runs:
            return ""
        return ", ".join(entry.statuses)

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
        contrasts: For each comparison, by name of metric, every two lines on their shared blocks.
    """

    comparisons: list[Comparison]
    metrics: Sequence[str]
    rows: list[Row]
    contrasts: list[dict[str, list[Contrast]]] = field(default_factory=list)

    def places(self, index: int, name: str) -> list[int | None]:
        """Return for every row its place, 1 or 2, in metric ``name`` on benchmark ``index``; None beyond.

        Upper bounds have none, nor have lines that lack a block where another line lacks none: seeds and
        orders that one was spared make no record. What is equal as printed, to two decimals, is equal: a
        mark may not hang on a digit that nobody sees.
        """
        ranked_lines = self._ranked(index)
        means = [
            round(row.statistic(index, name).mean, 2) if ranks else math.nan
            for row, ranks in zip(self.rows, ranked_lines, strict=True)
        ]
        ranked = sorted({mean for mean in means if not math.isnan(mean)}, reverse=HIGHER_IS_BETTER[name])
        return [ranked.index(mean) + 1 if mean in ranked[:2] else None for mean in means]

    def leaves_out_incomplete(self) -> bool:
        """Whether on any benchmark a line is not ranked because it lacks blocks that another has."""
        return any(
            row.was_run(index) and not row.is_joint and not ranks
            for index in range(len(self.comparisons))
            for row, ranks in zip(self.rows, self._ranked(index), strict=True)
        )

    def _ranked(self, index: int) -> list[bool]:
        complete = [not row.is_joint and self._is_complete(row, index) for row in self.rows]
        return complete if any(complete) else [not row.is_joint for row in self.rows]

    def _is_complete(self, row: Row, index: int) -> bool:
        entry = row.entries[index]
        return entry is not None and len(entry.runs) == len(self.comparisons[index].blocks)

    def count(self, row: Row, index: int, name: str) -> str:
        """Return how many runs are behind a value, and of how many blocks where some are absent."""
        n = row.statistic(index, name).n
        if row.entries[index] is None or self._is_complete(row, index):
            return str(n)
        return f"{n} of {len(self.comparisons[index].blocks)}"

    def pairs(self, index: int) -> list[Contrast]:
        """Return the contrasts to be read on benchmark ``index``, in the first metric shown.

        All of them, or those against the best line where there are too many.
        """
        made = self.contrasts[index][self.metrics[0]]
        if len(made) <= _MOST_PAIRS:
            return made
        return against(made, made[0].first)


def tables(comparisons: Sequence[Comparison], metrics: Sequence[str]) -> list[Table]:
    """Lay out ``comparisons``: benchmarks of one protocol side by side, others in tables of their own.

    Of one protocol are benchmarks whose identities are equal beyond what follows dataset and length, so that
    other weights or another precision never stand in the columns beside.
    """
    together: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        if comparison.only_protocol:
            together.setdefault(digest(comparison.beyond_the_data), []).append(comparison)
    apart = [[comparison] for comparison in comparisons if not comparison.only_protocol]
    return [_table(shown, metrics) for shown in [*together.values(), *apart]]


def _table(comparisons: list[Comparison], metrics: Sequence[str]) -> Table:
    by_label = [{entry.label: entry for entry in comparison.entries} for comparison in comparisons]
    labels = dict.fromkeys(label for entries in by_label for label in entries)
    rows = [Row(label, [entries.get(label) for entries in by_label]) for label in labels]
    made = [{name: contrasts(comparison, name) for name in metrics} for comparison in comparisons]
    return Table(comparisons, metrics, sorted(rows, key=lambda row: row.rank), corrected(made))
