"""Whether methods rank here as in a published table: rank correlations with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cl_bench.errors import suggestion
from cl_bench.report.comparison import Comparison, Entry
from cl_bench.report.statistics import CONFIDENCE, RESAMPLES, Interval
from cl_bench.report.tables import SHORT_NAMES
from cl_bench.report.text import signed
from cl_bench.report.tuning import study
from cl_bench.results.published import Published, published

METRICS = ("acc/sample", "maa/sample", "bwt/gem")
"""The metrics that published tables print."""

FEWEST = 4
"""Smallest number of methods for a correlation: chance orders three as published once in six times."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Correlation:
    """How well the order of the methods here agrees with the published one, in one metric.

    Attributes:
        metric: Name of the metric.
        methods: Config stems of the methods in both tables.
        kendall: Kendall's τ-b, in [-1, 1].
        kendall_interval: Its bootstrap interval.
        spearman: Spearman's ρ, in [-1, 1].
        spearman_interval: Its bootstrap interval.
    """

    metric: str
    methods: tuple[str, ...]
    kendall: float
    kendall_interval: Interval
    spearman: float
    spearman_interval: Interval


Columns = tuple[str, str, int]
"""Columns of a published table: source, as in ``published.csv``, dataset, length of the stream."""


def correlations(comparison: Comparison, columns: Columns, *, tuned: bool = False) -> list[Correlation]:
    """Return the rank correlations of the entries of ``comparison`` with a published table.

    The intervals are percentiles of bootstrap samples in which methods are drawn, and then runs of each.
    Joint training does not count.

    Args:
        comparison: Our results.
        columns: The published columns.
        tuned: Whether the entries are those whose settings a study found, or all others.

    Raises:
        ValueError: If no such table is known, it shares fewer than ``FEWEST`` methods with our results, or a
            method has several settings, of which a test result would choose one.
    """
    printed = _printed(columns)
    ours: dict[str, Entry] = {}
    for entry in _shared(comparison, printed)[tuned]:
        other = ours.setdefault(_stem(entry), entry)
        if other is not entry:
            raise ValueError(
                f"{other.label} and {entry.label} are one method with two settings, and a rank correlation "
                "needs one of each method: move the results of one of them elsewhere."
            )
    if len(ours) < FEWEST:
        raise ValueError(
            f"{comparison.title} shares {len(ours)} methods with the table of {columns[0]}, and a rank "
            f"correlation needs {FEWEST}: run more of "
            f"{', '.join(sorted({stem for stem, _ in printed} - ours.keys()))}."
        )
    return [
        _correlation(metric, ours, printed)
        for metric in METRICS
        if all((stem, metric) in printed for stem in ours)
    ]


def kendall(x: Array, y: Array) -> Array:
    """Return Kendall's τ-b (samples,) of the rows of two matrices (samples, methods); NaN if one is constant.

    Source: Kendall, 1945, https://doi.org/10.1093/biomet/33.3.239.

    >>> kendall(np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[1.0, 3.0, 2.0, 4.0]])).round(2)
    array([0.67])
    """
    signs = [np.sign(each[:, :, None] - each[:, None, :]) for each in (x, y)]
    agreement, in_x, in_y = (
        (one * other).sum(axis=(1, 2)) for one, other in ((*signs,), signs[:1] * 2, signs[1:] * 2)
    )
    with np.errstate(invalid="ignore"):
        return np.asarray(agreement / np.sqrt(in_x * in_y))


def spearman(x: Array, y: Array) -> Array:
    """Return Spearman's ρ (samples,) of the rows of two matrices (samples, methods); NaN if one is constant.

    >>> spearman(np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[1.0, 3.0, 2.0, 4.0]])).round(2)
    array([0.8])
    """
    from scipy.stats import rankdata

    ranks = [rankdata(each, axis=1) for each in (x, y)]
    one, other = (each - each.mean(axis=1, keepdims=True) for each in ranks)
    with np.errstate(invalid="ignore"):
        return np.asarray((one * other).sum(axis=1) / np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1)))


def _correlation(
    metric: str, ours: dict[str, Entry], printed: dict[tuple[str, str], Published]
) -> Correlation:
    methods = tuple(ours)
    values = [np.array(entry.statistic(metric).values) for entry in ours.values()]
    theirs = np.array([printed[stem, metric].mean for stem in methods])
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(methods), size=(RESAMPLES, len(methods)))
    here = np.array(
        [[generator.choice(values[index], len(values[index])).mean() for index in row] for row in drawn]
    )
    means = np.array([[each.mean() for each in values]])

    def found(measure: Callable[[Array, Array], Array]) -> tuple[float, Interval]:
        of_samples = measure(here, theirs[drawn])
        defined = of_samples[~np.isnan(of_samples)]
        tails = (1 - CONFIDENCE) / 2
        ends = np.quantile(defined, [tails, 1 - tails]) if len(defined) else (math.nan, math.nan)
        return float(measure(means, theirs[None])[0]), Interval(*map(float, ends))

    return Correlation(metric, methods, *found(kendall), *found(spearman))


def _printed(columns: Columns) -> dict[tuple[str, str], Published]:
    """Return the numbers of published columns by config stem and metric."""
    tables: dict[Columns, dict[tuple[str, str], Published]] = {}
    for row in published():
        if row.strategy and not row.setting:
            table = tables.setdefault((row.source.name, row.dataset, row.num_experiences), {})
            table.setdefault((row.strategy, row.metric), row)
    if columns not in tables:
        wanted, *known = (" ".join(map(str, each)) for each in (columns, *tables))
        raise ValueError(f"No published table {wanted!r} is known here. {suggestion(wanted, known)}")
    return tables[columns]


def _shared(comparison: Comparison, printed: dict[tuple[str, str], Published]) -> dict[bool, list[Entry]]:
    """Return the entries whose method is in a published table, by whether a study found their settings."""
    found: dict[bool, list[Entry]] = {False: [], True: []}
    for entry in comparison.finished:
        if not entry.is_joint and (_stem(entry), METRICS[0]) in printed:
            found[study(entry) is not None].append(entry)
    return found


def _stem(entry: Entry) -> str:
    """Return the config stem of the strategy of ``entry``: the module of its class."""
    class_path = str(entry.runs[0].config.get("model", {}).get("class_path"))
    return class_path.rpartition(".")[0].rpartition(".")[2]


def described(comparison: Comparison, columns: Columns) -> str:
    """Return the correlations in Markdown: a sentence, then a line for each metric.

    Rows that are tuned here have correlations of their own.
    """
    kinds = [tuned for tuned, found in _shared(comparison, _printed(columns)).items() if found] or [False]
    return "\n\n".join(_paragraph(comparison, columns, tuned) for tuned in kinds)


def _paragraph(comparison: Comparison, columns: Columns, tuned: bool) -> str:
    found = correlations(comparison, columns, tuned=tuned)
    source, dataset, length = columns
    methods = found[0].methods
    lines = [
        f"Rank correlation of {comparison.title}{', tuned here,' if tuned else ''} with {source}'s table on "
        f"{dataset}, T={length}, {len(methods)} methods ({', '.join(methods)}), with {CONFIDENCE:.0%} "
        "bootstrap intervals over methods and runs:\n",
        *(
            f"* {SHORT_NAMES[of.metric]}: Kendall's τ {of.kendall:+.2f} {signed(of.kendall_interval)}, "
            f"Spearman's ρ {of.spearman:+.2f} {signed(of.spearman_interval)}"
            for of in found
        ),
    ]
    return "\n".join(lines)
