"""Our results compared with published numbers: is the level met, and is the contrast?

The *level* of a strategy varies by some points with split, weights and class order, so 1.5 points are
tolerated. The *contrast*, one strategy minus another under one protocol, is what a paper claims. It is the
harder test: ours is taken on shared blocks and has an interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cl_bench.report.statistics import INTERVAL_BLOCKS, TOO_SMALL, Contrast, Statistic
from cl_bench.results.published import Published

TOLERANCE = 1.5
"""Points of percent within which a level is met, or within the printed spread if that is wider."""

NOT_RUN = "not run"
"""Verdict without a finished run of ours."""

MET = "met"
"""Verdict on a level within its tolerance."""


@dataclass(frozen=True)
class Level:
    """A published number and ours.

    Attributes:
        published: The printed number.
        ours: Statistic of our finished runs.
    """

    published: Published
    ours: Statistic

    @property
    def difference(self) -> float:
        """Ours minus theirs, in points; NaN if not run."""
        return self.ours.mean - self.published.mean

    @property
    def tolerance(self) -> float:
        """Points of percent that count as equal; a printed standard error is converted to a deviation.

        If the source does not state the number of runs, the standard error is ignored.
        """
        spread, source = self.published.std, self.published.source
        if source.spread == "standard error":
            spread = math.nan if source.runs is None else spread * math.sqrt(source.runs)
        return TOLERANCE if math.isnan(spread) else max(TOLERANCE, spread)

    @property
    def verdict(self) -> str:
        """Whether the level is met."""
        if self.ours.n == 0:
            return NOT_RUN
        if self.ours.n < INTERVAL_BLOCKS:
            return TOO_SMALL
        return MET if abs(self.difference) <= self.tolerance else "not met"


@dataclass(frozen=True)
class Claim:
    """A published difference of two strategies, and ours on shared blocks.

    Attributes:
        first: The first number.
        second: The number that is subtracted, of the same source, benchmark and metric.
        ours: Our paired difference; None if either was not run.
    """

    first: Published
    second: Published
    ours: Contrast | None

    @property
    def published(self) -> float:
        """The difference that the source prints, in points."""
        return self.first.mean - self.second.mean

    @property
    def verdict(self) -> str:
        """Whether the contrast is met."""
        if self.ours is None or self.ours.difference.n == 0:
            return NOT_RUN
        interval = self.ours.difference.interval
        if not interval.exists:
            return TOO_SMALL
        holds_zero, holds_theirs = 0.0 in interval, self.published in interval
        if holds_theirs:
            return "undecided: the interval contains theirs and zero" if holds_zero else MET
        if holds_zero:
            return "not met: the interval contains zero but not theirs"
        if self.ours.difference.mean * self.published > 0:
            return "same sign, another size"
        return "not met: the other sign"


def standing(
    strategy: str, parts: Sequence[str], levels: Sequence[Level], departures: Sequence[str] = ()
) -> str:
    """Return one or two sentences on what the numbers confirm about ``strategy``.

    Args:
        strategy: Its config stem.
        parts: Its reconstructed parts; agreement of numbers confirms none of them.
        levels: Its levels for its own source; none if no number of that source is known here.
        departures: Differences of our protocol from that of the source.
    """
    words = _standing(strategy, parts, levels, departures)
    if levels and departures:
        words += f" Levels are compared under another protocol ({'; '.join(departures)}): not a reproduction."
    return words


def _standing(strategy: str, parts: Sequence[str], levels: Sequence[Level], departures: Sequence[str]) -> str:
    if parts:
        return (
            f"{strategy} is partly a reconstruction: {'; '.join(parts)}. "
            "Agreement of numbers confirms none of these."
            + ("" if levels else " No number of its own paper or code is known here.")
        )
    follows = f"{strategy} follows its source in all parts"
    if not levels:
        return f"{follows}; no number of its own paper or code is known here."
    if any(level.verdict == NOT_RUN for level in levels):
        return f"{follows}; not all of it was run."
    if any(level.verdict != MET for level in levels):
        return f"{follows}; not every level is met."
    if departures:
        return f"{follows}; every level is met."
    if any(level.ours.n < (level.published.source.runs or 3) for level in levels):
        return f"{follows}; levels are met, on fewer runs than published."
    return f"{follows}, and every level is met: reproduced."
