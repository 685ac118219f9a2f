"""Comparisons as pictures: incremental accuracy over the experiences, and accuracy matrices side by side.

Figures are made without pyplot, so drawing leaves no global state and needs no display. They are laid out in
inches, with titles and labels outside the axes: save them with a tight bounding box.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cl_bench.errors import sentence, visible
from cl_bench.report.comparison import RANKING, Comparison, Entry, shortened
from cl_bench.report.tables import backbone, counted
from cl_bench.results.metrics import accuracy_matrix, incremental_accuracy

MOST_DRAWN = 16
"""Entries in one picture: readers cannot distinguish more."""

_MOST_NUMBERED = 12  # experiences up to which a number fits into each cell of a matrix
_WIDTH = 7.2  # inches: both columns of a paper
_LONGEST = 80  # characters of a name

Array = npt.NDArray[np.float64]

# Okabe and Ito's palette, https://jfly.uni-koeln.de/color/, without black, because the upper bound is grey,
# and without yellow, which is invisible on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("solid", (0, (1, 1.2)), (0, (5, 1, 1, 1)))
_SCALE = "viridis"
_INK, _FAINT = "#222222", "#767676"

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "axes.edgecolor": _FAINT,
    "axes.linewidth": 0.6,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "text.parse_math": False,  # a name with two dollars is a name
}


@dataclass(frozen=True)
class _Pen:
    """Colour, marker and dashes of one entry."""

    colour: str
    marker: str
    dashes: str | tuple[float, tuple[float, ...]]


_JOINT = _Pen(_FAINT, "None", (0, (5, 3)))


def pictures(comparison: Comparison, folder: Path, name: str) -> tuple[list[Path], list[str]]:
    """Draw ``comparison`` as PNG files in ``folder``, none without a finished run.

    Args:
        comparison: What is drawn.
        folder: Where the files are written.
        name: Part of their names.

    Returns:
        The paths, and a sentence for each picture that could not be drawn.
    """
    paths: list[Path] = []
    failed: list[str] = []
    for kind, draw in (("curves", curves), ("matrix", matrices)) if comparison.finished else ():
        try:
            content = _png(comparison, draw)
        except Exception as error:  # of any class: matplotlib draws names that nobody foresaw
            failed.append(f"Not drawn: {kind} of {visible(comparison.title)}: {sentence(error)}")
            continue
        paths.append(folder / f"{kind}_{name}.png")
        paths[-1].write_bytes(content)
    return paths, failed


def _png(comparison: Comparison, draw: Callable[[Comparison], Figure]) -> bytes:
    content = io.BytesIO()
    with rc_context(_STYLE), warnings.catch_warnings():  # some ticks are created while drawing
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # it is drawn as a box
        draw(comparison).savefig(content, dpi=200, bbox_inches="tight", pad_inches=0.08)
    return content.getvalue()


def curves(comparison: Comparison) -> Figure:
    """Draw accuracy over all images of the classes seen against the number of experiences learned.

    A line is a mean over runs, and the band around it one sample standard deviation. The upper bound is a
    dashed horizontal line, because only its end is known.
    """
    drawn = comparison.finished[:MOST_DRAWN]
    height = max(2.9, 0.19 * len(drawn))
    with rc_context(_STYLE):
        figure = Figure(figsize=(3.7, height))
        axes = figure.add_axes((0, 0, 1, 1))
        pens = _pens(drawn)
        ends = [_curve(axes, entry, pen) for entry, pen in zip(drawn, pens, strict=True)]
        _finish_curves(axes, comparison)
        _label_ends(axes, drawn, pens, ends, height)
        band = "; band: one sample standard deviation" if any(len(entry.runs) > 1 for entry in drawn) else ""
        _headline(axes, comparison, above=8, remark=band)
        return figure


def matrices(comparison: Comparison) -> Figure:
    """Draw the accuracy matrix of every entry, a mean over its runs, on one colour scale.

    Row i is the evaluation after experience i, column j the images of experience j.
    """
    drawn = comparison.finished[:MOST_DRAWN]
    means = [_mean_matrix(entry) for entry in drawn]
    scale = _scale(means)
    with rc_context(_STYLE):
        length = comparison.results[0].num_experiences
        size = max(0.185 * length, 1.5) if length <= _MOST_NUMBERED else 2.1
        titles = [textwrap.fill(label, int(16 * size)) for label in _labels(drawn)]
        lines = 1 + max(title.count("\n") for title in titles)
        figure, panels, bar = _panels(len(drawn), length, size, lines)
        for panel, title, mean in zip(panels, titles, means, strict=True):
            _matrix(panel, mean, scale)
            panel.set_title(title, loc="left", fontsize=7.5, pad=4)
        colours = figure.colorbar(ScalarMappable(scale, _SCALE), cax=bar)
        colours.set_label("accuracy (%)")
        colours.outline.set_visible(False)
        _headline(panels[0], comparison, above=10 + 9.5 * lines)
        return figure


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


def _labels(drawn: Sequence[Entry]) -> list[str]:
    return [shortened([entry.label], _LONGEST)[0] for entry in drawn]


def _pens(drawn: Sequence[Entry]) -> list[_Pen]:
    # By name, not by rank, so that a strategy has one colour in the pictures of all benchmarks.
    labels = sorted(entry.label for entry in drawn if not entry.is_joint)
    places = {label: place for place, label in enumerate(labels)}
    return [_JOINT if entry.is_joint else _pen(places[entry.label]) for entry in drawn]


def _pen(place: int) -> _Pen:
    lap, turn = divmod(place, len(_COLOURS))
    return _Pen(_COLOURS[turn], _MARKERS[turn], _DASHES[lap % len(_DASHES)])


def _curve(axes: Axes, entry: Entry, pen: _Pen) -> float:
    """Draw one entry and return its final accuracy."""
    runs = np.array([incremental_accuracy(run.counts("correct"), run.totals) for run in entry.runs])
    mean = runs.mean(axis=0)
    if entry.is_joint:
        axes.axhline(mean[-1], color=pen.colour, linestyle=pen.dashes, linewidth=1.0, zorder=1.5)
        return float(mean[-1])
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
    return float(mean[-1])


def _finish_curves(axes: Axes, comparison: Comparison) -> None:
    length = comparison.results[0].num_experiences
    axes.set_xlim(1 - 0.03 * length, 1.03 * length)
    axes.set_xticks(_ticks(length))
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.0), min(high, 100.0))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("experiences learned")
    axes.set_ylabel("accuracy over all classes seen (%)")


def _label_ends(
    axes: Axes, drawn: Sequence[Entry], pens: Sequence[_Pen], ends: Sequence[float], height: float
) -> None:
    """Write each label at the end of its line, moved up or down if lines end together."""
    low, high = axes.get_ylim()
    line_height = (high - low) * 0.17 / height
    heights = spread(ends, line_height, low, high)
    left, right = axes.get_xlim()
    length = drawn[0].runs[0].num_experiences
    right_of_axes = axes.get_yaxis_transform()
    for entry, label, pen, end, at in zip(drawn, _labels(drawn), pens, ends, heights, strict=True):
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
        axes.text(1.1, at, label, transform=right_of_axes, va="center", fontsize=7.5)


def _mean_matrix(entry: Entry) -> Array:
    runs = np.array([accuracy_matrix(run.counts("correct"), run.totals) for run in entry.runs])
    return np.asarray(runs.mean(axis=0))


def _scale(means: Sequence[Array]) -> Normalize:
    """Return the scale from the tens below the lowest accuracy to the tens above the highest."""
    lowest = min(float(np.nanmin(mean)) for mean in means)
    highest = max(float(np.nanmax(mean)) for mean in means)
    low = min(10 * math.floor(lowest / 10), 90)
    return Normalize(low, max(10 * math.ceil(highest / 10), low + 10))


def _panels(number: int, length: int, size: float, lines: int) -> tuple[Figure, list[Axes], Axes]:
    """Return ``number`` square panels of ``size`` inches under ``lines`` lines of title, and a colour bar."""
    across, down = size + 0.3, size + 0.25 + 0.13 * lines
    rows = math.ceil(number / int(_WIDTH / across))
    columns = math.ceil(number / rows)
    width, height = columns * across, rows * down
    figure = Figure(figsize=(width, height))

    def axes_at(row: int, column: int, wide: float) -> Axes:
        bottom = height - row * down - size
        return figure.add_axes((column * across / width, bottom / height, wide / width, size / height))

    panels = [axes_at(*divmod(place, columns), size) for place in range(number)]
    for place, panel in enumerate(panels):
        panel.set_xticks(_ticks(length))
        panel.set_yticks(_ticks(length))
        if place + columns >= number:
            panel.set_xlabel("evaluated on experience")
        else:
            panel.tick_params(labelbottom=False)
        if place % columns == 0:
            panel.set_ylabel("after experience")
        else:
            panel.tick_params(labelleft=False)
    return figure, panels, axes_at(0, columns, 0.09)


def _matrix(panel: Axes, mean: Array, scale: Normalize) -> None:
    length = len(mean)
    edges = np.arange(length + 1) + 0.5
    lines = 4 / (length + 4)
    panel.pcolormesh(edges, edges, mean, cmap=_SCALE, norm=scale, edgecolors="white", linewidth=lines)
    panel.set_aspect("equal")
    panel.invert_yaxis()
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    if length > _MOST_NUMBERED:
        return
    for i, j in np.argwhere(~np.isnan(mean)):
        red, green, blue, _ = colormaps[_SCALE](scale(mean[i, j]))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        panel.text(
            j + 1,
            i + 1,
            f"{mean[i, j]:.0f}",
            ha="center",
            va="center_baseline",
            fontsize=6,
            color="white" if dark else "black",
        )


def _headline(axes: Axes, comparison: Comparison, above: float, remark: str = "") -> None:
    """Write what the picture shows, ``above`` points over the top left corner of ``axes``."""
    run = comparison.results[0]
    protocol = "" if comparison.only_protocol else f", protocol {comparison.fingerprint}"
    numbers = [len(entry.runs) for entry in comparison.finished[:MOST_DRAWN]]
    fewest = "" if min(numbers) == max(numbers) else f"{min(numbers)} to "
    left_out = len(comparison.finished) - len(numbers)
    lines = [
        backbone(comparison.identity),
        f"{'mean over ' if max(numbers) > 1 else ''}{fewest}{counted(max(numbers), 'run')}{remark}",
        *([f"the {len(numbers)} highest in {RANKING}; {left_out} more in the table"] if left_out else []),
    ]
    place: dict[str, Any] = {
        "xy": (0, 1),
        "xycoords": "axes fraction",
        "textcoords": "offset points",
        "va": "bottom",
    }
    axes.annotate("\n".join(lines), xytext=(0, above), color=_FAINT, fontsize=7, linespacing=1.25, **place)
    axes.annotate(
        f"{shortened([visible(run.dataset)], _LONGEST)[0]}, "
        f"{counted(run.num_experiences, 'experience')}{protocol}",
        xytext=(0, above + 9.5 * len(lines) + 2),
        fontsize=9,
        fontweight="bold",
        **place,
    )


def _ticks(length: int) -> list[int]:
    step = next((step for step in (1, 5, 10, 25, 50) if length <= 12 * step), length)
    return sorted({1, *range(step, length + 1, step)})
