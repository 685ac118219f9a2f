"""What all pictures share: width and font, the formats PNG, PDF and SVG, headlines and heat maps.

Figures are made without pyplot, so drawing leaves no global state and needs no display. Titles and labels lie
outside of the axes; :meth:`Picture.fit` makes room for them. Text in a PDF or SVG is text.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from cl_bench.errors import visible
from cl_bench.report.comparison import RANKING, Comparison, Entry, shortened
from cl_bench.report.tables import backbone, counted

Array = npt.NDArray[np.float64]

MOST_DRAWN = 16
"""Entries in one picture: readers cannot distinguish more."""

WIDTHS = {"column": 3.25, "page": 6.75}
"""Widths in inches that have a name: one column and both columns of a paper."""

INK, FAINT = "#222222", "#767676"
"""Colours of text and of what surrounds the data."""

_SCALE = "viridis"
_SMALL = 0.9  # of the font size, for remarks and titles of panels
_LONGEST = 80  # characters of a name
_MOST_NUMBERED = 12  # rows up to which a number fits into each cell of a heat map
_LEAST_POINTS = 4.0  # of a number in a cell
_WIDEST_PANEL = 2.75  # inches
_GAP = 0.3  # inches between panels
_PAD = 0.03  # inches around what is drawn
_NARROWEST = 0.6  # inches of axes in which a curve can still be read
_EM = 0.58  # mean width of a letter of DejaVu Sans, in font sizes

# What would differ between two files of the same picture.
_WITHOUT_DATE: dict[str, dict[str, Any]] = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}


@dataclass(frozen=True)
class Style:
    """How pictures are drawn.

    Args:
        width: Width of a picture, in inches.
        font: Size of its labels, in points.

    Raises:
        ValueError: If a picture of that size cannot be read.
    """

    width: float = WIDTHS["page"]
    font: float = 8.0

    def __post_init__(self) -> None:
        """Check width and font size."""
        if not 1 <= self.width <= 50:
            raise ValueError(f"A picture cannot be {self.width:g} inches wide: give 1 to 50.")
        if not 3 <= self.font <= 40:
            raise ValueError(f"A font size cannot be {self.font:g} points: give 3 to 40.")

    def letters(self, inches: float, share: float = 1.0) -> int:
        """Return how many letters fit into ``inches`` in ``share`` of the font size."""
        return max(8, int(72 * inches / (_EM * share * self.font)))

    @property
    def line(self) -> float:
        """Height of a line of labels, in inches."""
        return 1.5 * self.font / 72

    @property
    def parameters(self) -> dict[Any, Any]:
        """The parameters of matplotlib."""
        colours = {
            "axes.edgecolor": FAINT,
            "axes.labelcolor": INK,
            "text.color": INK,
            "xtick.color": FAINT,
            "ytick.color": FAINT,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
        }
        return colours | {
            "font.family": "DejaVu Sans",
            "font.size": self.font,
            "axes.linewidth": 0.6,
            "xtick.major.width": 0.6,
            "ytick.major.width": 0.6,
            "text.parse_math": False,  # a name with two dollars is a name
            "pdf.fonttype": 42,  # TrueType, which journals ask for, instead of outlines
            "svg.fonttype": "none",
            "svg.hashsalt": "cl-bench",  # equal pictures are equal files
        }

    def without_room(self) -> ValueError:
        """Return the error of a picture whose labels fill its width."""
        return ValueError(
            f"Its labels leave no room in {self.width:g} inches: give a larger --figure-width or a smaller "
            "--font-size."
        )

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw in this style; a character that the font lacks is drawn as a box, without a warning."""
        with rc_context(self.parameters), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            yield


DEFAULT = Style()
"""Both columns of a paper, in the size of its captions."""


class Picture(Figure):
    """A figure in one style, saved with whatever lies outside of its axes; a notebook shows it.

    Args:
        style: Width and font.
        width: Width of its axes, in inches.
        height: Height of its axes, in inches.
    """

    def __init__(self, style: Style, width: float, height: float) -> None:
        super().__init__(figsize=(width, height))
        self.style = style

    def fit(self) -> None:
        """Change the width of the axes, which span the figure: with labels, they fill that of the style.

        Raises:
            ValueError: If the labels leave no room for the axes.
        """
        for _ in range(3):  # what is placed in shares of the axes moves with them
            width = self.get_figwidth() + self.style.width - self.extent.width
            if width < _NARROWEST:
                raise self.style.without_room()
            self.set_figwidth(width)

    @property
    def extent(self) -> Bbox:
        """The box around everything that is drawn, in inches."""
        with self.style.drawing():
            renderer = FigureCanvasAgg(self).get_renderer()  # type: ignore[no-untyped-call]
            return self.get_tightbbox(renderer).padded(_PAD)

    def savefig(self, fname: Any, **options: Any) -> None:
        """Save as matplotlib does; the ending of ``fname`` decides the format."""
        with self.style.drawing():  # some ticks are created only now
            if "bbox_inches" not in options:
                options["bbox_inches"] = self.extent
            super().savefig(fname, **{"dpi": 200} | options)

    def written(self, path: Path, endings: Sequence[str]) -> list[Path]:
        """Write the picture to ``path`` with each of ``endings``, and return the paths."""
        contents = {ending: io.BytesIO() for ending in endings}
        extent = self.extent
        for ending, content in contents.items():
            self.savefig(content, format=ending, bbox_inches=extent, metadata=_WITHOUT_DATE[ending])
        paths = [path.with_name(f"{path.name}.{ending}") for ending in contents]
        for file, content in zip(paths, contents.values(), strict=True):
            file.write_bytes(content.getvalue())
        return paths

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=120)
        return content.getvalue()


def heat_maps(
    comparison: Comparison,
    drawn: Sequence[Entry],
    tables: Sequence[Array],
    scale: Normalize,
    names: tuple[str, str, str],
    numbers: Sequence[int],
    style: Style,
) -> Picture:
    """Draw a square table of numbers for each entry, side by side, on one colour scale.

    Args:
        comparison: What the entries belong to.
        drawn: The entries.
        tables: Their tables, (n, n) each; NaN stays white.
        scale: The colour scale.
        names: What stands at rows, at columns and at the colour scale.
        numbers: How many runs each table is a mean over.
        style: Width and font.
    """
    with style.drawing():
        length = len(tables[0])
        least = max(0.018 * style.font * length, 1.3) if length <= _MOST_NUMBERED else 2.0
        least = min(least, 0.28 * style.width)
        around = 0.12 * style.font  # inches of labels and colour scale; corrected once they are drawn
        for _ in range(2):
            room = style.width - around
            rows = math.ceil(len(drawn) / max(1, int((room + _GAP) / (least + _GAP))))
            columns = math.ceil(len(drawn) / rows)
            size = min((room + _GAP) / columns - _GAP, _WIDEST_PANEL)
            if size < 0.4:
                raise style.without_room()
            figure = _heat_maps(drawn, tables, scale, names, style, columns, size)
            lines = max(panel.get_title(loc="left").count("\n") for panel in figure.axes) + 1
            headline(figure.axes[0], comparison, style, numbers, above=1.2 + 1.25 * lines)
            around = figure.extent.width - columns * (size + _GAP) + _GAP
        return figure


def _heat_maps(
    drawn: Sequence[Entry],
    tables: Sequence[Array],
    scale: Normalize,
    names: tuple[str, str, str],
    style: Style,
    columns: int,
    size: float,
) -> Picture:
    """Draw as :func:`heat_maps` does, without a headline, in ``columns`` of panels of ``size`` inches."""
    titles = labels(drawn, style.letters(size, _SMALL))
    lines = 1 + max(title.count("\n") for title in titles)
    across, down = size + _GAP, size + _GAP + style.line * lines
    rows = math.ceil(len(drawn) / columns)
    width, height = columns * across, rows * down
    figure = Picture(style, width, height)

    def axes_at(row: int, column: int, wide: float) -> Axes:
        bottom = height - row * down - size
        return figure.add_axes((column * across / width, bottom / height, wide / width, size / height))

    places = ticks(len(tables[0]))
    panels = [axes_at(*divmod(place, columns), size) for place in range(len(drawn))]
    for place, (panel, title, table) in enumerate(zip(panels, titles, tables, strict=True)):
        _heat_map(panel, table, scale, style, size)
        panel.set_title(title, loc="left", fontsize=_SMALL * style.font, pad=4)
        panel.set_xticks(places)
        panel.set_yticks(places)
        panel.tick_params(labelbottom=place + columns >= len(drawn), labelleft=place % columns == 0)
        if place + columns >= len(drawn):
            panel.set_xlabel(names[1])
        if place % columns == 0:
            panel.set_ylabel(names[0])
    colours = figure.colorbar(ScalarMappable(scale, _SCALE), cax=axes_at(0, columns, 0.09))
    colours.set_label(names[2])
    colours.outline.set_visible(False)
    return figure


def _heat_map(panel: Axes, table: Array, scale: Normalize, style: Style, size: float) -> None:
    length = len(table)
    edges = np.arange(length + 1) + 0.5
    lines = 4 / (length + 4)
    panel.pcolormesh(edges, edges, table, cmap=_SCALE, norm=scale, edgecolors="white", linewidth=lines)
    panel.set_aspect("equal")
    panel.invert_yaxis()
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    numbers = min(0.75 * style.font, 34 * size / length)  # points: two digits fit into a cell
    if length > _MOST_NUMBERED or numbers < _LEAST_POINTS:
        return
    for i, j in np.argwhere(~np.isnan(table)):
        red, green, blue, _ = colormaps[_SCALE](scale(table[i, j]))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        panel.text(
            j + 1,
            i + 1,
            f"{table[i, j]:.0f}",
            ha="center",
            va="center_baseline",
            fontsize=numbers,
            color="white" if dark else "black",
        )


def headline(
    axes: Axes,
    comparison: Comparison,
    style: Style,
    numbers: Sequence[int],
    above: float = 1.0,
    remark: str = "",
) -> None:
    """Write what the picture shows, ``above`` font sizes over the top left corner of ``axes``.

    ``numbers`` has the number of runs of every entry that is drawn.
    """
    run = comparison.results[0]
    protocol = "" if comparison.only_protocol else f", protocol {comparison.fingerprint}"
    fewest = "" if min(numbers) == max(numbers) else f"{min(numbers)} to "
    left_out = len(comparison.finished) - len(numbers)
    remarks = [
        backbone(comparison.identity),
        f"{'mean over ' if max(numbers) > 1 else ''}{fewest}{counted(max(numbers), 'run')}{remark}",
        *([f"the {len(numbers)} highest in {RANKING}; {left_out} more in the table"] if left_out else []),
    ]
    title = (
        f"{shortened([visible(run.dataset)], _LONGEST)[0]}, "
        f"{counted(run.num_experiences, 'experience')}{protocol}"
    )
    room = style.width - 0.07 * style.font  # right of the labels of the vertical axis
    lines = [line for one in remarks for line in textwrap.wrap(one, style.letters(room, _SMALL))]
    place: dict[str, Any] = {
        "xy": (0, 1),
        "xycoords": "axes fraction",
        "textcoords": "offset points",
        "va": "bottom",
        "linespacing": 1.25,
    }
    low = above * style.font
    axes.annotate("\n".join(lines), xytext=(0, low), color=FAINT, fontsize=_SMALL * style.font, **place)
    axes.annotate(
        textwrap.fill(title, style.letters(room, 1.25)),
        xytext=(0, low + (1.2 * len(lines) + 0.3) * style.font),
        fontsize=1.1 * style.font,
        fontweight="bold",
        **place,
    )


def ticks(length: int) -> list[int]:
    """Return the numbers from 1 to ``length`` that an axis names."""
    step = next((step for step in (1, 5, 10, 25, 50) if length <= 12 * step), length)
    return sorted({1, *range(step, length + 1, step)})


def labels(drawn: Sequence[Entry], letters: int) -> list[str]:
    """Return names in lines of at most ``letters``."""
    return [textwrap.fill(shortened([entry.label], _LONGEST)[0], letters) for entry in drawn]
