"""How the settings of each row were chosen: a word for tables, and the studies behind tuned rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from cl_bench.errors import visible
from cl_bench.report.comparison import Comparison, Entry
from cl_bench.report.tables import UNDEFINED, Table
from cl_bench.results.metrics import HIGHER_IS_BETTER
from cl_bench.results.tuning import Tuning, from_plain

HEADING = "settings"
"""Heading of how settings were chosen, in tables where some run has recorded it."""

HOW = {"published": "published settings", "tuned": "tuned here", "by hand": "by hand"}
"""Words for how the settings of a run were chosen."""

SCORES = (
    "scores in percent on held-out training images, the only ones that a study sees; best settings are those "
    "of the row."
)
"""Sentence about a table of studies."""

FACTORS = (
    "score of the best settings, and what it changes by if the learning rate is multiplied; in percent on "
    "held-out training images, one run each."
)
"""Sentence about a table of sensitivities."""

_DIGITS = 3  # significant ones of a setting in a table


def chosen(entry: Entry) -> str:
    """Return how the settings of an entry were chosen, in words; empty if no run has recorded it."""
    return ", ".join(
        sorted({HOW[run.provenance["settings"]] for run in entry.runs if "settings" in run.provenance})
    )


def marks(table: Table) -> list[str]:
    """Return how the settings of each row were chosen, in words; an empty list if no run has recorded it."""
    words = [
        ", ".join(dict.fromkeys(chosen(entry) for entry in row.entries if entry is not None))
        for row in table.rows
    ]
    return [word or UNDEFINED for word in words] if any(words) else []


def study(entry: Entry) -> Tuning | None:
    """Return the study whose best settings an entry has; None if it has none."""
    found = [run.provenance["tuning"] for run in entry.runs if run.provenance.get("settings") == "tuned"]
    return from_plain(found[0]) if found else None


def studies(comparison: Comparison) -> list[tuple[Entry, Tuning]]:
    """Return the entries with a study, the higher ranked first."""
    return [(entry, found) for entry in comparison.entries if (found := study(entry)) is not None]


def best_so_far(study: Tuning) -> list[float]:
    """Return the best score among the first 1, 2, … completed trials; NaN until one has completed.

    A trial that was pruned, or whose loss was not finite, is not completed.
    """
    better = max if HIGHER_IS_BETTER.get(study.metric, True) else min
    whole = max(study.experiences)
    best, found = math.nan, []
    for score, learnt in zip(study.scores, study.experiences, strict=True):
        if score is not None and learnt == whole:
            best = score if math.isnan(best) else better(best, score)
        found.append(best)
    return found


def tuned_columns(comparison: Comparison) -> list[list[str]]:
    """Return a table of the studies by columns, each with its heading; empty if there are none."""
    rows = studies(comparison)
    columns: dict[str, Callable[[Tuning], str]] = {
        "seen": lambda one: one.on,
        "budget": _budget,
        "trials": lambda one: str(len(one.scores)),
        "epochs": lambda one: f"{one.spent['epochs']:.0f}" if "epochs" in one.spent else UNDEFINED,
        "score": lambda one: one.metric,
        "as configured": lambda one: _score(one.scores[0]),
        "best": lambda one: _score(one.scores[one.best]),
        "runner-up": lambda one: UNDEFINED if one.runner_up is None else _score(one.scores[one.runner_up]),
        "best settings": _settings,
    }
    if not rows:
        return []
    return [_labels(rows)] + [
        [heading, *(visible(text(one)) for _, one in rows)] for heading, text in columns.items()
    ]


def sensitivity_columns(comparison: Comparison) -> list[list[str]]:
    """Return what the best settings lose at other learning rates, by columns; empty without a measurement."""
    rows = [(entry, found) for entry, found in studies(comparison) if found.sensitivity is not None]
    factors = {factor: None for _, one in rows if one.sensitivity for factor in one.sensitivity.factors}
    if not rows:
        return []
    keys = ["learning rate", *(visible(one.sensitivity.key) for _, one in rows if one.sensitivity)]
    return [_labels(rows), keys] + [
        [f"{factor:g}×", *(_lost(one, factor) for _, one in rows)] for factor in factors
    ]


def _labels(rows: Sequence[tuple[Entry, Tuning]]) -> list[str]:
    return ["strategy", *(entry.label for entry, _ in rows)]


def _budget(one: Tuning) -> str:
    return ", ".join(f"{amount:g} {unit}" for unit, amount in one.budget.items())


def _settings(one: Tuning) -> str:
    named = (
        f"{key} {value:.{_DIGITS}g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in one.chosen.items()
    )
    return ", ".join(named)


def _lost(one: Tuning, factor: float) -> str:
    """Return the score at ``factor`` times the tuned rate minus that at the tuned rate itself."""
    measured = one.sensitivity
    if measured is None or factor not in measured.factors:
        return UNDEFINED
    value, best = measured.scores[measured.factors.index(factor)], one.scores[one.best]
    if value is None or best is None:
        return "not finite"
    return f"{value:.2f}" if factor == 1 else f"{value - best:+.2f}"


def _score(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2f}"
