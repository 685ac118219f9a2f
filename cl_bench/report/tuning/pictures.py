"""Studies as pictures: the best score after each trial, and the score over every setting."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from cl_bench.report.comparison import Comparison, Entry
from cl_bench.report.pictures import Kind, pens
from cl_bench.report.pictures.figures import DEFAULT, FAINT, MOST_DRAWN, Picture, Style, headline, labels
from cl_bench.report.tuning import best_so_far, studies
from cl_bench.results.tuning import Tuning

_GAP = 0.45  # inches between panels
_TALL = 0.9  # inches of a panel
_MOST_ROWS = 12


def progress(comparison: Comparison, style: Style = DEFAULT) -> Picture | None:
    """Draw the best score after each number of trials, a line for each study; None without a study."""
    rows = studies(comparison)[:MOST_DRAWN]
    if not rows:
        return None
    with style.drawing():
        figure = Picture(style, 0.6 * style.width, min(0.62 * style.width, 2.9))
        axes = figure.add_axes((0, 0, 1, 1))
        drawn = [entry for entry, _ in rows]
        names = labels(drawn, style.letters(0.35 * style.width))
        for (_, study), name, pen in zip(rows, names, pens(drawn), strict=True):
            best = best_so_far(study)
            axes.step(
                range(1, len(best) + 1),
                best,
                where="post",
                label=name,
                color=pen.colour,
                linestyle=pen.dashes,
                marker=pen.marker,
                markersize=3.0,
                linewidth=1.2,
            )
        axes.set_xlabel("trials")
        axes.set_ylabel(f"best {rows[0][1].metric} so far (%)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.02), frameon=False)
        headline(axes, comparison, style, [len(entry.runs) for entry in drawn], remark=_seen(rows))
        figure.fit()
        return figure


def over_settings(comparison: Comparison, style: Style = DEFAULT) -> Picture | None:
    """Draw the score of every trial over each of its settings, a row of panels for each study.

    The title of a panel is the setting, with its importance. The best trial is filled; a trial that was
    pruned, whose score is that of fewer experiences, is a cross. None without a study.
    """
    rows = [(entry, study) for entry, study in studies(comparison) if study.settings][:_MOST_ROWS]
    if not rows:
        return None
    columns = max(len(study.settings) for _, study in rows)
    with style.drawing():
        wide = max(0.6, 0.88 * style.width / columns - _GAP)
        down = _TALL + 1.4 * _GAP
        width, height = columns * (wide + _GAP), len(rows) * down
        figure = Picture(style, width, height)
        names = labels([entry for entry, _ in rows], style.letters(_TALL))
        first = None
        for line, ((_, study), name) in enumerate(zip(rows, names, strict=True), 1):
            for column, key in enumerate(study.settings):
                left, bottom = column * (wide + _GAP), height - line * down
                axes = figure.add_axes((left / width, bottom / height, wide / width, _TALL / height))
                first = first or axes
                _over(axes, study, key, style)
                if column == 0:
                    axes.set_ylabel(name)
        assert first is not None
        narrow = Style(0.9 * style.width, style.font)  # that of the panels, without their labels
        numbers = [len(entry.runs) for entry, _ in rows]
        headline(first, comparison, narrow, numbers, above=2.2, remark=_seen(rows))
        return figure


TUNING: dict[str, Kind] = {
    "tuning": progress,
    "settings": over_settings,
}
"""The pictures of a comparison with studies, by the first part of their file names."""


def _over(axes: Axes, study: Tuning, key: str, style: Style) -> None:
    """Draw the scores of the trials that have a setting over its values."""
    values = study.settings[key]
    has = [
        trial for trial, value in enumerate(values) if value is not None and study.scores[trial] is not None
    ]
    numbers = all(isinstance(values[trial], int | float) for trial in has)
    numbers = numbers and "choices" not in study.space.get(key, {})
    places = [float(values[trial]) if numbers else str(values[trial]) for trial in has]
    whole = max(study.experiences)
    kinds = {
        "x": [study.experiences[trial] < whole for trial in has],
        "o": [study.experiences[trial] == whole for trial in has],
    }
    scores = np.array([study.scores[trial] for trial in has], dtype=np.float64)
    for marker, chosen in kinds.items():
        axes.scatter(
            [place for place, one in zip(places, chosen, strict=True) if one],
            scores[np.array(chosen, dtype=bool)],
            marker=marker,
            s=1.6 * style.font,
            facecolors=FAINT if marker == "x" else "none",
            edgecolors=None if marker == "x" else FAINT,
            linewidths=0.7,
        )
    if study.best in has:
        place = places[has.index(study.best)]
        axes.scatter([place], [scores[has.index(study.best)]], s=2.4 * style.font, color="#D55E00", zorder=3)
    if study.space.get(key, {}).get("log") is True and numbers:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    share = study.importance.get(key)
    axes.set_title(f"{key}{'' if share is None else f', {share:.0%}'}", loc="left", fontsize=0.9 * style.font)
    axes.tick_params(labelsize=0.8 * style.font)
    axes.spines[["top", "right"]].set_visible(False)


def _seen(rows: list[tuple[Entry, Tuning]]) -> str:
    """Return what the scores of the studies are of."""
    study = rows[0][1]
    return f"; scores: {study.metric} of {study.on} on held-out training images"
