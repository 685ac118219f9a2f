"""What a handful of runs can show: intervals, paired differences, tests, and the limits of each.

A *block* is a seed with a class order. Two strategies are compared on the blocks that they share: the effect
of the block cancels in their difference. SciPy and statsmodels do the mathematics; this file sets the
smallest numbers of blocks for intervals, verdicts and tests.

The ends of an interval are possible values, and no interval is narrower than what the images evaluated can
resolve: one image for a mean, one image of either entry for a difference.

Below ``PERMUTATION_BLOCKS`` a sign-flip test cannot reach 0.05, however large the difference: if ``n``
differences all have one sign, the two-sided p value is ``2 / 2**n``, which is 0.0625 for five.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cl_bench.results.metrics import HIGHER_IS_BETTER

CONFIDENCE = 0.95
"""Confidence of every interval."""

INTERVAL_BLOCKS = 3
"""Smallest number of values for an interval, and of shared blocks for a verdict."""

Bounds = tuple[float, float]
"""The least and the greatest possible value."""

UNBOUNDED: Bounds = (-math.inf, math.inf)
"""Bounds of a quantity that may have any value."""

LEVEL = 0.05
"""Significance level of every test, after Holm's correction."""

PERMUTATION_BLOCKS = 6
"""Smallest number of shared blocks for a permutation test."""

BOOTSTRAP_BLOCKS = 10
"""Smallest number of values for a bootstrap interval."""

EXACT_BLOCKS = 13
"""Largest number of shared blocks for which a test uses every sign pattern."""

PERMUTATIONS = 49_999
"""Random sign patterns for more blocks: enough to pass about 1,200 tests at ``LEVEL`` after Holm."""

RESAMPLES = 1_999
"""Number of resamples of a bootstrap."""

TOO_SMALL = "n too small"
"""Text of a cell with too few blocks for its interval or test."""

NOISE = "possibly noise"
"""Verdict on a difference whose interval contains zero."""

Array = npt.NDArray[np.float64]

_PATTERNS_AT_ONCE = 10_000


@dataclass(frozen=True)
class Interval:
    """From ``low`` to ``high``; NaN if there are too few values for an interval."""

    low: float = math.nan
    high: float = math.nan

    @property
    def exists(self) -> bool:
        """Whether there are enough values for it."""
        return not math.isnan(self.low)

    def __contains__(self, value: float) -> bool:
        """Return whether ``value`` lies in it, ends included."""
        return self.low <= value <= self.high

    def widened(self, width: float, centre: float, bounds: Bounds) -> Interval:
        """Return it with its ends moved apart to at least ``width`` around ``centre``, inside ``bounds``.

        >>> Interval(99.9, 99.9).widened(1.0, 99.9, (0.0, 100.0))
        Interval(low=99.0, high=100.0)
        """
        if not self.exists:
            return self
        low, high = min(self.low, centre - width / 2), max(self.high, centre + width / 2)
        least, greatest = bounds
        if high > greatest:
            low, high = min(low, greatest - width), greatest
        if low < least:
            low, high = least, max(high, min(least + width, greatest))
        return Interval(low, high)


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation of ``n`` values; NaN if there are too few.

    Attributes:
        mean: Mean of the values.
        std: Sample standard deviation of two or more values.
        n: Number of values.
        values: The values.
        bounds: The least and the greatest possible value.
        resolution: What one image changes: no interval is narrower.
    """

    mean: float
    std: float
    n: int
    values: tuple[float, ...] = field(default=(), repr=False)
    bounds: Bounds = field(default=UNBOUNDED, repr=False)
    resolution: float = field(default=0.0, repr=False)

    @cached_property
    def interval(self) -> Interval:
        """Bounded interval of the mean of ``INTERVAL_BLOCKS`` or more values."""
        found = bounded_interval(self.mean, self.std, self.n, self.bounds)
        return found.widened(self.resolution, self.mean, self.bounds)

    @cached_property
    def bootstrap(self) -> Interval:
        """Bootstrap interval of the mean of ``BOOTSTRAP_BLOCKS`` or more values."""
        found = bootstrap_interval(np.array(self.values))
        return found.widened(self.resolution, self.mean, self.bounds)


NO_VALUES = Statistic(math.nan, math.nan, 0)
"""Statistic of a metric that no run has."""


def statistic(values: Iterable[float], bounds: Bounds = UNBOUNDED, resolution: float = 0.0) -> Statistic:
    """Return the statistic of ``values`` that are not NaN.

    >>> statistic([1.0, 2.0, math.nan, 3.0])
    Statistic(mean=2.0, std=1.0, n=3)
    >>> statistic([4.0])
    Statistic(mean=4.0, std=nan, n=1)
    """
    defined = [value for value in values if not math.isnan(value)]
    n = len(defined)
    mean = float(np.mean(defined)) if n else math.nan
    std = float(np.std(defined, ddof=1)) if n >= 2 else math.nan
    return Statistic(mean, std, n, tuple(defined), bounds, resolution)


def bounded_interval(mean: float, std: float, n: int, bounds: Bounds = UNBOUNDED) -> Interval:
    """Return the interval of a mean of ``n`` values with sample standard deviation ``std``.

    It is Student's, ``mean ± t(0.975, n - 1) std / √n``, taken on a scale that has no ends and carried back,
    so that its own ends are possible values. That scale is the logarithm of the odds, ``log(p / (1 - p))``
    for the share ``p`` of the way from the least to the greatest value, or the logarithm if only the least
    value is known. The standard error on it follows by the delta method, ``s / (p (1 - p))`` and
    ``s / mean``. NaN below ``INTERVAL_BLOCKS`` values.

    Source: the logit confidence limits of a mean share in surveys,
    https://support.sas.com/documentation/cdl/en/statug/65328/HTML/default/statug_surveyfreq_details32.htm,
    also ``xlogit`` of R's ``survey::svyciprop``.

    >>> interval = bounded_interval(50.0, 10.0, 5, (0.0, 100.0))
    >>> round(interval.low, 2), round(interval.high, 2)
    (37.83, 62.17)
    """
    if n < INTERVAL_BLOCKS:
        return Interval()
    from scipy.special import expit, logit, stdtrit

    half = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2)) * std / math.sqrt(n)
    least, greatest = bounds
    if math.isinf(least):
        return Interval(mean - half, mean + half)
    above = mean - least
    if above <= 0.0 or mean >= greatest:  # then all values are equal
        return Interval(mean, mean)
    if math.isinf(greatest):
        return Interval(least + above * math.exp(-half / above), least + above * math.exp(half / above))
    width = greatest - least
    p = above / width
    if p == 1.0:  # a mean within rounding of the greatest value, and so are all values
        return Interval(mean, mean)
    ends = expit(logit(p) + np.array([-1.0, 1.0]) * half / (width * p * (1 - p)))
    return Interval(*(float(least + width * end) for end in ends))


def bootstrap_interval(values: Array) -> Interval:
    """Return the bias-corrected and accelerated bootstrap interval of the mean of ``values`` (n,).

    It is NaN below ``BOOTSTRAP_BLOCKS`` values. The resamples have a fixed seed, so a report of the same
    results stays the same.

    Source: Efron, 1987, https://doi.org/10.1080/01621459.1987.10478410.
    """
    if len(values) < BOOTSTRAP_BLOCKS:
        return Interval()
    if np.ptp(values) == 0.0:  # every resample has this mean, and the acceleration is 0/0
        return Interval(float(values[0]), float(values[0]))
    from scipy.stats import bootstrap

    found = bootstrap(
        (values,), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, rng=np.random.default_rng(0)
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


def permutation_p(differences: Array) -> Array:
    """Return the two-sided p value (pairs,) that the mean of each row of ``differences`` (pairs, n) is zero.

    If two strategies are exchangeable within a block, both signs of its difference are equally likely. The p
    value is the share of sign patterns whose mean is at least as far from zero as the observed one. All
    ``2**n`` patterns are used up to ``EXACT_BLOCKS``, beyond that ``PERMUTATIONS`` random ones from a fixed
    seed. NaN below ``PERMUTATION_BLOCKS``.

    Source: Fisher, The Design of Experiments, 1935, §21.

    >>> permutation_p(np.array([[1.0, 2.0, 1.0, 3.0, 1.0, 2.0], [1.0, -1.0, 1.0, -1.0, 1.0, -1.0]]))
    array([0.03125, 1.     ])
    """
    pairs, n = differences.shape
    if n < PERMUTATION_BLOCKS or pairs == 0:
        return np.full(pairs, np.nan)
    if n > EXACT_BLOCKS:
        return _drawn_p(differences)
    from scipy.stats import permutation_test

    # For one sample, `samples` flips signs; with as many resamples as patterns, SciPy uses every pattern
    # once.
    found = permutation_test(
        (differences,), np.mean, permutation_type="samples", vectorized=True, axis=-1, n_resamples=2**n
    )
    return np.atleast_1d(np.asarray(found.pvalue, dtype=np.float64))


def _drawn_p(differences: Array) -> Array:
    """Return SciPy's p values for random patterns by matrix products, many times faster for many pairs."""
    rng = np.random.default_rng(0)
    observed = differences.sum(axis=1)
    slack = 1e-12 * np.abs(differences).sum(axis=1)  # equal sums may differ by rounding
    at_least = np.zeros(len(differences))
    at_most = np.zeros(len(differences))
    for start in range(0, PERMUTATIONS, _PATTERNS_AT_ONCE):
        number = min(_PATTERNS_AT_ONCE, PERMUTATIONS - start)
        signs = rng.integers(0, 2, (number, differences.shape[1]), dtype=np.int8) * 2.0 - 1.0
        sums = signs @ differences.T
        at_least += (sums >= observed - slack).sum(axis=0)
        at_most += (sums <= observed + slack).sum(axis=0)
    one_sided = (np.minimum(at_least, at_most) + 1) / (PERMUTATIONS + 1)
    return np.asarray(np.minimum(1.0, 2 * one_sided))


def smallest_p(n: int) -> float:
    """Return the smallest p value of `permutation_p` for ``n`` blocks, however large the difference.

    >>> smallest_p(6)
    0.03125
    """
    return 2.0 ** (1 - n) if n <= EXACT_BLOCKS else 2 / (PERMUTATIONS + 1)


def holm(p: Sequence[float]) -> list[float]:
    """Return the p values after Holm's correction over those that are not NaN.

    Source: Holm, 1979, https://www.jstor.org/stable/4615733.

    >>> holm([0.01, math.nan, 0.04])
    [0.02, nan, 0.04]
    """
    values = np.array(p, dtype=np.float64)
    made = ~np.isnan(values)
    if made.any():
        from statsmodels.stats.multitest import multipletests

        values[made] = multipletests(values[made], alpha=LEVEL, method="holm")[1]
    return [float(value) for value in values]


@dataclass(frozen=True)
class Contrast:
    """The difference of two entries in one metric, block by block.

    Attributes:
        first: Label of the first entry.
        second: Label of the second entry, which is subtracted.
        metric: Name of the metric.
        difference: ``first - second`` over the shared blocks.
        p: Two-sided p value of a sign-flip permutation test; NaN if there are too few shared blocks.
        p_holm: The p value after Holm's correction over every pair, metric and benchmark of the table. See
            :func:`corrected`.
        tests: Number of tests in that correction.
    """

    first: str
    second: str
    metric: str
    difference: Statistic
    p: float = math.nan
    p_holm: float = math.nan
    tests: int = 0

    @property
    def wins(self) -> int:
        """Number of shared blocks in which ``first`` is better."""
        sign = 1 if HIGHER_IS_BETTER[self.metric] else -1
        return sum(sign * value > 0 for value in self.difference.values)

    @property
    def ties(self) -> int:
        """Number of shared blocks in which both are equal."""
        return sum(value == 0 for value in self.difference.values)

    @property
    def losses(self) -> int:
        """Number of shared blocks in which ``second`` is better."""
        return self.difference.n - self.wins - self.ties

    @property
    def verdict(self) -> str:
        """What the difference shows, in a few words."""
        if self.difference.n == 0:
            return "no shared block"
        if self.difference.n < INTERVAL_BLOCKS:
            return TOO_SMALL
        if 0.0 in self.difference.interval:
            return NOISE
        if self.difference.n < PERMUTATION_BLOCKS:
            return "interval clear of zero; too few blocks to test"
        if self.p_holm < LEVEL:
            return "significant after Holm"
        if self.tests * smallest_p(self.difference.n) >= LEVEL:
            return f"interval clear of zero; too few blocks for {self.tests} tests"
        return "not significant after Holm"


def corrected(families: Sequence[Mapping[str, Sequence[Contrast]]]) -> list[dict[str, list[Contrast]]]:
    """Return the contrasts of a table after Holm's correction over all of them.

    Args:
        families: For every benchmark of the table, its contrasts by name of the metric.
    """
    every = [pair.p for by_metric in families for pairs in by_metric.values() for pair in pairs]
    tests = sum(not math.isnan(p) for p in every)
    p_holm = iter(holm(every))
    return [
        {
            name: [replace(pair, p_holm=next(p_holm), tests=tests) for pair in pairs]
            for name, pairs in by_metric.items()
        }
        for by_metric in families
    ]


def against(contrasts: Iterable[Contrast], label: str) -> list[Contrast]:
    """Return the contrasts that have ``label`` as their first or second entry."""
    return [contrast for contrast in contrasts if label in (contrast.first, contrast.second)]


def tested(differences: Sequence[Statistic]) -> list[float]:
    """Return the p value of each difference; those with equally many blocks share one call."""
    p = [math.nan] * len(differences)
    by_n: dict[int, list[int]] = {}
    for place, difference in enumerate(differences):
        by_n.setdefault(difference.n, []).append(place)
    for n, places in by_n.items():
        if n >= PERMUTATION_BLOCKS:
            found = permutation_p(np.array([differences[place].values for place in places]))
            for place, value in zip(places, found, strict=True):
                p[place] = float(value)
    return p
