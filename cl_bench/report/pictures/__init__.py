"""Comparisons as pictures: accuracy over the experiences, matrices, accuracy against seconds, confusion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from cl_bench.artifacts.confusion import placed
from cl_bench.errors import sentence, visible
from cl_bench.report.comparison import RANKING, Comparison, Entry
from cl_bench.report.pictures.figures import (
    DEFAULT,
    FAINT,
    MOST_DRAWN,
    Array,
    Picture,
    Style,
    headline,
    heat_maps,
    labels,
    ticks,
)
from cl_bench.results.metrics import accuracy_matrix, incremental_accuracy

_FAR = 5.0  # a number so many times as large as the next would squeeze the others

# Okabe and Ito's palette, https://jfly.uni-koeln.de/color/, without black, because the upper bound is grey,
# and without yellow, which is invisible on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("solid", (0, (1, 1.2)), (0, (5, 1, 1, 1)))


Kind = Callable[[Comparison, Style], Picture | None]
"""Draws one picture of a comparison; None if the runs have nothing to draw."""


@dataclass(frozen=True)
class Pen:
    """Colour, marker and dashes of one entry."""

    colour: str
    marker: str
    dashes: str | tuple[float, tuple[float, ...]]


_JOINT = Pen(FAINT, "None", (0, (5, 3)))


def pictures(
    comparison: Comparison,
    folder: Path,
    name: str,
    style: Style = DEFAULT,
    endings: Sequence[str] = ("png",),
    kinds: Mapping[str, Kind] | None = None,
) -> tuple[list[Path], list[str]]:
    """Draw ``comparison`` as files in ``folder``, none without a finished run.

    Args:
        comparison: What is drawn.
        folder: Where the files are written.
        name: Part of their names.
        style: Width and font.
        endings: ``png``, ``pdf`` or ``svg``, as many as wanted.
        kinds: The pictures, by the first part of their file names; None for ``PICTURES``.

    Returns:
        The paths, and a sentence for each picture that could not be drawn.
    """
    paths: list[Path] = []
    failed: list[str] = []
    for kind, draw in (PICTURES if kinds is None else kinds).items() if comparison.finished else ():
        try:
            picture = draw(comparison, style)
            paths += picture.written(folder / f"{kind}_{name}", endings) if picture else []
        except Exception as error:  # of any class: matplotlib draws names that nobody foresaw
            failed.append(f"Not drawn: {kind} of {visible(comparison.title)}: {sentence(error)}")
    return paths, failed


def curves(comparison: Comparison, style: Style = DEFAULT) -> Picture:
    """Draw accuracy over all images of the classes seen against the number of experiences learned.

    A line is a mean over runs, and the band around it one sample standard deviation, which the axis may cut.
    The upper bound is a dashed horizontal line, because only its end is known.
    """
    drawn = comparison.finished[:MOST_DRAWN]
    with style.drawing():
        names = labels(drawn, style.letters(0.4 * style.width))
        lines = max(name.count("\n") for name in names) + 1
        figure = Picture(
            style, 0.6 * style.width, max(min(0.62 * style.width, 2.9), style.line * lines * len(drawn))
        )
        axes = figure.add_axes((0, 0, 1, 1))
        chosen = pens(drawn)
        means = [_curve(axes, entry, pen) for entry, pen in zip(drawn, chosen, strict=True)]
        _finish_curves(axes, comparison, means)
        ends = [float(mean[-1]) for mean in means]
        _label_ends(axes, drawn, names, chosen, ends, lines * style.line / figure.get_figheight())
        band = "; band: one sample standard deviation" if any(len(entry.runs) > 1 for entry in drawn) else ""
        headline(axes, comparison, style, _numbers(drawn), remark=band)
        figure.fit()
        return figure


def matrices(comparison: Comparison, style: Style = DEFAULT) -> Picture:
    """Draw the accuracy matrix of every entry, a mean over its runs, on one colour scale.

    Row i is the evaluation after experience i, column j the images of experience j.
    """
    drawn = comparison.finished[:MOST_DRAWN]
    means = [_mean_matrix(entry) for entry in drawn]
    names = ("after experience", "evaluated on experience", "accuracy (%)")
    return heat_maps(comparison, drawn, means, _scale(means), names, _numbers(drawn), style)


def confusions(comparison: Comparison, style: Style = DEFAULT) -> Picture | None:
    """Draw where the images of each experience are placed at the end, in percent; None if no cell knows.

    Row i is the experience of the images, column j that of the class they are taken for.
    """
    drawn = [entry for entry in comparison.finished if entry.confusions][:MOST_DRAWN]
    if not drawn:
        return None
    tables = [placed([one.experiences for one in entry.confusions]) for entry in drawn]
    names = ("experience of the images", "experience of the prediction", "share of the images (%)")
    numbers = [len(entry.confusions) for entry in drawn]
    return heat_maps(comparison, drawn, tables, Normalize(0, 100), names, numbers, style)


def costs(comparison: Comparison, style: Style = DEFAULT) -> Picture | None:
    """Draw final accuracy against the seconds of a run; whiskers are one sample standard deviation.

    An entry that takes far longer than all others stands at the end of the axis, with its seconds. None if no
    run has measured its seconds.
    """
    drawn = [entry for entry in comparison.finished if entry.statistic("seconds").n][:MOST_DRAWN]
    if not drawn:
        return None
    with style.drawing():
        figure = Picture(style, 0.6 * style.width, min(0.62 * style.width, 2.9))
        axes = figure.add_axes((0, 0, 1, 1))
        seconds = [entry.statistic("seconds").mean for entry in drawn]
        end = 1.15 * reach(seconds)
        names = labels(drawn, style.letters(0.35 * style.width))
        for entry, label, pen, taken in zip(drawn, names, pens(drawn), seconds, strict=True):
            accuracy = entry.statistic(RANKING)
            axes.errorbar(
                [min(taken, end)],
                [accuracy.mean],
                yerr=[accuracy.std] if accuracy.n > 1 else None,
                label=label,
                color=pen.colour,
                marker="_" if entry.is_joint else pen.marker,
                linestyle="none",
                elinewidth=0.8,
                markersize=0.7 * style.font,
                clip_on=False,
            )
            if taken > end:
                axes.annotate(
                    f"{taken:,.0f} s →",
                    (end, accuracy.mean),
                    xytext=(-0.6 * style.font, 0),
                    textcoords="offset points",
                    ha="right",
                    va="center",
                    color=FAINT,
                    fontsize="small",
                )
        axes.set_xlim(0, end or 1)
        _in_percent(axes, [entry.statistic(RANKING).mean for entry in drawn])
        axes.set_xlabel("seconds of a run")
        axes.set_ylabel("final accuracy (%)")
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.02), frameon=False, handletextpad=0.3)
        headline(axes, comparison, style, _numbers(drawn))
        figure.fit()
        return figure


PICTURES: dict[str, Kind] = {
    "curves": curves,
    "matrix": matrices,
    "cost": costs,
    "confusion": confusions,
}
"""The pictures of a comparison, by the first part of their file names; None if their data are missing."""


def reach(sizes: Sequence[float]) -> float:
    """Return how far an axis from zero goes for ``sizes``, none of them negative.

    At least half of them are shown, and all others that are at most five times the one before.

    >>> reach([1.0, 100.0, 1.2, 1.5]), reach([2.0, 100.0, 100.0]), reach([1.0, 2.0, 4.0, 8.0])
    (1.5, 100.0, 8.0)
    """
    ordered = sorted(sizes)
    for i in range((len(ordered) + 1) // 2, len(ordered)):
        if 0 < ordered[i - 1] < ordered[i] / _FAR:
            return ordered[i - 1]
    return ordered[-1]


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return ``positions`` moved to distances of at least ``gap``, between ``low`` and ``high``, in order.

    They move as little as possible in least squares, by pooling adjacent violators. If there are too many for
    the space, their distances are equal.

    >>> spread([5.0, 5.0, 9.0], gap=2.0, low=0.0, high=10.0)
    [4.0, 6.0, 9.0]
    """
    gap = min(gap, (high - low) / max(1, len(positions) - 1))
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    pools: list[tuple[float, int]] = []
    for place, index in enumerate(order):
        pools.append((positions[index] - place * gap, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (above, many), (below, few) = pools.pop(), pools.pop()
            pools.append(((above * many + below * few) / (many + few), many + few))
    shifted = [value for value, size in pools for _ in range(size)]
    room = high - (len(positions) - 1) * gap
    moved = [0.0] * len(positions)
    for place, (index, value) in enumerate(zip(order, shifted, strict=True)):
        moved[index] = min(max(value, low), room) + place * gap
    return moved


def _numbers(drawn: Sequence[Entry]) -> list[int]:
    return [len(entry.runs) for entry in drawn]


def pens(drawn: Sequence[Entry]) -> list[Pen]:
    """Return a pen for each entry: by name, so that a strategy has one colour in all pictures."""
    labels = sorted(entry.label for entry in drawn if not entry.is_joint)
    places = {label: place for place, label in enumerate(labels)}
    return [_JOINT if entry.is_joint else _pen(places[entry.label]) for entry in drawn]


def _pen(place: int) -> Pen:
    lap, turn = divmod(place, len(_COLOURS))
    return Pen(_COLOURS[turn], _MARKERS[turn], _DASHES[lap % len(_DASHES)])


def _curve(axes: Axes, entry: Entry, pen: Pen) -> Array:
    """Draw one entry and return its mean accuracies that are drawn."""
    runs = np.array([incremental_accuracy(run.counts("correct"), run.totals) for run in entry.runs])
    mean = runs.mean(axis=0)
    if entry.is_joint:
        axes.axhline(mean[-1], color=pen.colour, linestyle=pen.dashes, linewidth=1.0, zorder=1.5)
        return np.asarray(mean[-1:])
    learned = np.arange(1, len(mean) + 1)
    axes.plot(
        learned,
        mean,
        color=pen.colour,
        linestyle=pen.dashes,
        linewidth=1.3,
        marker=pen.marker,
        markersize=3.6,
        markeredgecolor="white",
        markeredgewidth=0.5,
        markevery=max(1, len(mean) // 10),
        clip_on=False,  # a marker at 0 or 100 is drawn whole
    )
    if len(runs) > 1:
        std = runs.std(axis=0, ddof=1)
        low, high = np.clip(mean - std, 0.0, 100.0), np.clip(mean + std, 0.0, 100.0)
        axes.fill_between(learned, low, high, color=pen.colour, alpha=0.15, linewidth=0)
    return np.asarray(mean)


def _finish_curves(axes: Axes, comparison: Comparison, means: Sequence[Array]) -> None:
    length = comparison.results[0].num_experiences
    axes.set_xlim(1 - 0.03 * length, 1.03 * length)
    axes.set_xticks(ticks(length))
    _in_percent(axes, np.concatenate(means))
    axes.set_xlabel("experiences learned")
    axes.set_ylabel("accuracy over all classes seen (%)")


def _in_percent(axes: Axes, means: Sequence[float] | Array) -> None:
    """Let the vertical axis span ``means`` in percent with some room, as far as values are possible."""
    low, high = float(np.min(means)), float(np.max(means))
    room = max(4.0, 0.12 * (high - low))
    axes.set_ylim(max(low - room, 0.0), min(high + room, 100.0))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label_ends(
    axes: Axes,
    drawn: Sequence[Entry],
    names: Sequence[str],
    pens: Sequence[Pen],
    ends: Sequence[float],
    gap: float,
) -> None:
    """Write each name at the end of its line, moved up or down if lines end together.

    Names are ``gap`` apart, as a share of the height of ``axes``.
    """
    low, high = axes.get_ylim()
    heights = spread(ends, (high - low) * gap, low, high)
    left, right = axes.get_xlim()
    length = drawn[0].runs[0].num_experiences
    right_of_axes = axes.get_yaxis_transform()
    for entry, label, pen, end, at in zip(drawn, names, pens, ends, heights, strict=True):
        axes.plot(
            [1.0 if entry.is_joint else (length - left) / (right - left) + 0.02, 1.03, 1.08],
            [end, at, at],
            transform=right_of_axes,
            color=pen.colour,
            linestyle=pen.dashes,
            linewidth=0.7,
            marker=pen.marker,
            markevery=[2],
            markersize=3.6,
            clip_on=False,
        )
        axes.annotate(
            label,
            (1.08, at),
            xycoords=right_of_axes,
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            annotation_clip=False,
        )


def _mean_matrix(entry: Entry) -> Array:
    runs = np.array([accuracy_matrix(run.counts("correct"), run.totals) for run in entry.runs])
    return np.asarray(runs.mean(axis=0))


def _scale(means: Sequence[Array]) -> Normalize:
    """Return the scale from the tens below the lowest accuracy to the tens above the highest."""
    lowest = min(float(np.nanmin(mean)) for mean in means)
    highest = max(float(np.nanmax(mean)) for mean in means)
    low = min(10 * math.floor(lowest / 10), 90)
    return Normalize(low, max(10 * math.ceil(highest / 10), low + 10))
