"""Ours beside the published number: is the level met, and is the contrast?

The *level* of a strategy moves by points with split, weights and class order, so it says little beyond 1.5
points. The *contrast*, one strategy minus another under one protocol, is what a paper claims, and it is the
harder test: ours is taken on shared blocks and comes with an interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cl_bench.report.statistics import TOO_SMALL, Contrast, Statistic
from cl_bench.reproduce.numbers import Published

TOLERANCE = 1.5
"""Points of percent within which a level counts as met, or the paper's own spread where that is wider."""

NOT_RUN = "not run"
"""Verdict where we have no finished run."""

MET = "met"
"""Verdict on a level within its tolerance."""


@dataclass(frozen=True)
class Level:
    """One published number with ours.

    Attributes:
        published: The printed number.
        ours: What our finished runs say.
    """

    published: Published
    ours: Statistic

    @property
    def difference(self) -> float:
        """Ours minus theirs, in points; NaN if not run."""
        return self.ours.mean - self.published.mean

    @property
    def tolerance(self) -> float:
        """Points of percent that count as equal; a printed standard error is taken back to a deviation.

        Where the source does not say over how many runs, that cannot be done and the spread is left out.
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
        return MET if abs(self.difference) <= self.tolerance else "not met"


@dataclass(frozen=True)
class Claim:
    """A published difference of two strategies with ours on shared blocks.

    Attributes:
        first: The number that is counted positively.
        second: The number that is taken away, of the same source, benchmark and metric.
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
            return "undecided: the interval holds theirs, and zero" if holds_zero else MET
        if holds_zero:
            return "not met: the interval holds zero and not theirs"
        if self.ours.difference.mean * self.published > 0:
            return "same sign, another size"
        return "not met: the other sign"


def standing(
    strategy: str, parts: Sequence[str], levels: Sequence[Level], departures: Sequence[str] = ()
) -> str:
    """Say in one sentence what the numbers confirm of ``strategy``.

    Args:
        strategy: Its config stem.
        parts: What of it is reconstructed; agreement of numbers confirms none of it.
        levels: Its levels under one source, its own; none if no number of that is known here.
        departures: How the protocol of our runs differs from that of the source.
    """
    said = _standing(strategy, parts, levels, departures)
    if levels and departures:
        said += f" Levels are compared under another protocol ({'; '.join(departures)}): not a reproduction."
    return said


def _standing(strategy: str, parts: Sequence[str], levels: Sequence[Level], departures: Sequence[str]) -> str:
    if parts:
        return (
            f"{strategy} is a reconstruction in parts: {'; '.join(parts)}. "
            "Agreement of numbers confirms none of these."
            + ("" if levels else " No number of its own paper or code is known here.")
        )
    if not levels:
        return (
            f"{strategy} follows its source in all parts; no number of its own paper or code is known here."
        )
    if any(level.verdict == NOT_RUN for level in levels):
        return f"{strategy} follows its source in all parts; not all of it was run."
    if departures:
        met = (
            "every level is met"
            if all(level.verdict == MET for level in levels)
            else "not every level is met"
        )
        return f"{strategy} follows its source in all parts; {met}."
    if all(level.verdict == MET and level.ours.n >= (level.published.source.runs or 3) for level in levels):
        return f"{strategy} follows its source in all parts, and every level is met: reproduced."
    if all(level.verdict == MET for level in levels):
        return f"{strategy} follows its source in all parts; levels are met, on fewer runs than published."
    return f"{strategy} follows its source in all parts; not every level is met."
