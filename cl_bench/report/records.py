"""The content of a report for programs: CSV with one statistic a line, and JSON as one tree."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from cl_bench.report.comparison import Entry
from cl_bench.report.statistics import CONFIDENCE, Contrast, Interval, Statistic
from cl_bench.report.tables import Table, absences, definitions, mixed_provenance, protocol_differences
from cl_bench.report.tuning import chosen
from cl_bench.results.escapes import in_csv, in_json
from cl_bench.results.result import COSTS

_KEYS = ["benchmark", "fingerprint"]
_SUMMARY = ["mean", "std", "n", "low", "high"]
_BOOTSTRAP = ["bootstrap_low", "bootstrap_high"]


def tidy(tables: Sequence[Table]) -> str:
    """Return every statistic of ``tables`` as a line of CSV, in percent, seconds, numbers and megabytes."""
    lines = [
        [
            comparison.benchmark,
            comparison.fingerprint,
            entry.strategy,
            entry.label,
            entry.group,
            name,
            *_summary(entry.statistic(name)),
            *_ends(entry.statistic(name).bootstrap),
        ]
        for table in tables
        for comparison in table.comparisons
        for entry in comparison.entries
        for name in (*table.metrics, *COSTS)
    ]
    return _csv([*_KEYS, "strategy", "label", "group", "metric", *_SUMMARY, *_BOOTSTRAP], lines)


def tidy_differences(tables: Sequence[Table]) -> str | None:
    """Return every paired difference as a line of CSV; None with fewer than two rows."""
    lines = [
        [
            comparison.benchmark,
            comparison.fingerprint,
            pair.first,
            pair.second,
            name,
            *_summary(pair.difference),
            pair.wins,
            pair.ties,
            pair.losses,
            finite(pair.p),
            finite(pair.p_holm),
            pair.verdict,
        ]
        for table in tables
        for comparison, by_metric in zip(table.comparisons, table.contrasts, strict=True)
        for name, pairs in by_metric.items()
        for pair in pairs
    ]
    header = [*_KEYS, "first", "second", "metric", *_SUMMARY]
    header += ["wins", "ties", "losses", "p", "p_holm", "verdict"]
    return _csv(header, lines) if lines else None


def tidy_absences(tables: Sequence[Table]) -> str | None:
    """Return every run that is in no mean as a line of CSV; None if there are none."""
    lines = [
        [comparison.benchmark, comparison.fingerprint, run.label, run.seed, run.order, run.status, run.error]
        for table in tables
        for comparison in table.comparisons
        for run in absences(comparison)
    ]
    header = [*_KEYS, "label", "seed", "order", "status", "error"]
    return _csv(header, lines) if lines else None


def tree(tables: Sequence[Table]) -> str:
    """Return ``tables`` as JSON: for every benchmark its protocol, entries, runs and differences.

    Undefined values are null.
    """
    names = list(dict.fromkeys(name for table in tables for name in table.metrics))
    shown = [comparison for table in tables for comparison in table.comparisons]
    payload = {
        "confidence": CONFIDENCE,
        "definitions": dict(
            zip(names, (line.partition(": ")[2] for line in definitions(names)), strict=True)
        ),
        "protocol_differences": protocol_differences(shown),
        "benchmarks": [
            _benchmark(table, index) for table in tables for index in range(len(table.comparisons))
        ],
    }
    return in_json(payload, indent=1) + "\n"


def _benchmark(table: Table, index: int) -> dict[str, Any]:
    comparison = table.comparisons[index]
    return {
        "benchmark": comparison.benchmark,
        "fingerprint": comparison.fingerprint,
        "protocol": dict(comparison.identity),
        "entries": [_entry(entry, table.metrics) for entry in comparison.entries],
        "differences": [_difference(pair) for pairs in table.contrasts[index].values() for pair in pairs],
        "absent": [vars(absence) for absence in absences(comparison)],
        "mixed_provenance": mixed_provenance(comparison),
    }


def _entry(entry: Entry, names: Sequence[str]) -> dict[str, Any]:
    return {
        "label": entry.label,
        "strategy": entry.strategy,
        "group": entry.group,
        "regime": entry.regime,
        "training_data": entry.training_data or None,
        "settings": chosen(entry) or None,
        "statistics": {name: statistic_record(entry.statistic(name)) for name in (*names, *COSTS)},
        "runs": [
            {
                "seed": run.seed,
                "order": run.order,
                "cell": run.cell,
                "values": {
                    name: finite(value) for name, value in entry.measured[run.seed, run.order].items()
                },
                "provenance": run.provenance,
            }
            for run in entry.runs
        ],
    }


def _difference(pair: Contrast) -> dict[str, Any]:
    return {
        "first": pair.first,
        "second": pair.second,
        "metric": pair.metric,
        **statistic_record(pair.difference, bootstrap=False),
        "wins": pair.wins,
        "ties": pair.ties,
        "losses": pair.losses,
        "p": finite(pair.p),
        "p_holm": finite(pair.p_holm),
        "verdict": pair.verdict,
    }


def statistic_record(value: Statistic, *, bootstrap: bool = True) -> dict[str, Any]:
    """Return ``value`` as plain JSON, with null for NaN; leaving out the bootstrap saves time."""
    record: dict[str, Any] = {
        "mean": finite(value.mean),
        "std": finite(value.std),
        "n": value.n,
        "interval": _ends(value.interval) if value.interval.exists else None,
    }
    if bootstrap:
        record["bootstrap"] = _ends(value.bootstrap) if value.bootstrap.exists else None
    return record


def finite(value: float) -> float | None:
    """Return ``value`` rounded to six decimals, or None if it is NaN.

    >>> finite(12.3456789), finite(math.nan)
    (12.345679, None)
    """
    return None if math.isnan(value) else round(value, 6)


def _summary(value: Statistic) -> list[float | None]:
    return [finite(value.mean), finite(value.std), value.n, *_ends(value.interval)]


def _ends(interval: Interval) -> list[float | None]:
    return [finite(interval.low), finite(interval.high)]


def _csv(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(map(in_csv, line) for line in lines)
    return text.getvalue()
