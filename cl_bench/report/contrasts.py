"""Strategies two by two on the blocks they share: how much one is ahead, and whether that may be noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cl_bench.report.comparison import Block, Comparison, Entry
from cl_bench.report.statistics import (
    LEVEL,
    PERMUTATION_BLOCKS,
    TOO_SMALL,
    Statistic,
    holm,
    permutation_p,
    smallest_p,
    statistic,
)
from cl_bench.results.metrics import HIGHER_IS_BETTER

NOISE = "possibly noise"
"""Verdict on a difference whose interval holds zero."""

_DIGITS = 9  # decimals of a point of percent that are kept: what differs beyond them differs by rounding


@dataclass(frozen=True)
class Contrast:
    """The difference of two entries in one metric, block by block.

    Attributes:
        first: Label of the entry that is counted positively.
        second: Label of the entry that is taken away.
        metric: Name of the metric.
        difference: ``first - second`` over the shared blocks.
        p: Two-sided p value of a sign-flip permutation test; NaN where there are too few shared blocks.
        p_holm: The same after Holm's correction over all tests of the table: every pair, metric and
            benchmark of it. See :func:`corrected`.
        tests: How many tests that correction covers.
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
        """Shared blocks in which ``first`` is the better one."""
        sign = 1 if HIGHER_IS_BETTER[self.metric] else -1
        return sum(sign * value > 0 for value in self.difference.values)

    @property
    def ties(self) -> int:
        """Shared blocks in which both are equal."""
        return sum(value == 0 for value in self.difference.values)

    @property
    def losses(self) -> int:
        """Shared blocks in which ``second`` is the better one."""
        return self.difference.n - self.wins - self.ties

    @property
    def verdict(self) -> str:
        """What may be said of the difference, in a few words."""
        if self.difference.n == 0:
            return "no shared block"
        if not self.difference.interval.exists:
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


def contrasts(comparison: Comparison, metric: str) -> list[Contrast]:
    """Compare every two finished entries of ``comparison`` in ``metric``, on the blocks they share.

    Upper bounds are left out: nothing competes with them. Of each pair the entry that ranks higher comes
    first; pairs are in the order of the ranking. Their p values are not corrected yet: the tests that a
    reader sees together are those of a table.
    """
    entries = [entry for entry in comparison.finished if not entry.is_joint]
    made = [contrast(first, second, metric) for first, second in itertools.combinations(entries, 2)]
    p = _tested([made_one.difference for made_one in made])
    return [replace(made_one, p=p_one) for made_one, p_one in zip(made, p, strict=True)]


def corrected(families: Sequence[Mapping[str, Sequence[Contrast]]]) -> list[dict[str, list[Contrast]]]:
    """Return the contrasts of a table after Holm's correction over all of them.

    Args:
        families: For every benchmark of the table, by name of metric, its contrasts.
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


def contrast(first: Entry, second: Entry, metric: str) -> Contrast:
    """Return the difference of two entries on the blocks they share, without a test."""
    ours, theirs = _by_block(first, metric), _by_block(second, metric)
    shared = sorted(ours.keys() & theirs.keys())
    values = (round(ours[block] - theirs[block], _DIGITS) for block in shared)
    return Contrast(first.label, second.label, metric, statistic(values))


def against(contrasts: Iterable[Contrast], label: str) -> list[Contrast]:
    """Return the contrasts in which ``label`` is one of the two."""
    return [contrast for contrast in contrasts if label in (contrast.first, contrast.second)]


def _by_block(entry: Entry, metric: str) -> Mapping[Block, float]:
    return {
        block: values[metric] for block, values in entry.measured.items() if not math.isnan(values[metric])
    }


def _tested(differences: Sequence[Statistic]) -> list[float]:
    """The p value of each, those of equally many blocks in one call: the sign patterns are the same."""
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
