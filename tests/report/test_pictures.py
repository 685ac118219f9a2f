from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from cl_bench.report.comparison import Comparison, comparisons
from cl_bench.report.pictures import PICTURES, costs, curves, matrices, pictures, spread
from cl_bench.report.pictures.figures import MOST_DRAWN, WIDTHS, Picture, Style
from cl_bench.results.result import Cost, Result

Made = Callable[..., Result]

positions = st.lists(st.floats(0, 100), min_size=1, max_size=12)


@pytest.fixture
def comparison(made: Made) -> Comparison:
    """Two runs of a strategy, one of another, and an upper bound."""
    results = [
        made(seed=1),
        made(counts=((10,), (7, 8)), seed=2),
        made("NCM", ((8,), (8, 5))),
        made(counts=(None, (9, 10)), regime="joint"),
    ]
    return comparisons(results)[0]


def _pixels(path: Path) -> npt.NDArray[np.float32]:
    return np.asarray(imread(path), dtype=np.float32)[..., :3]


def test_pictures_are_files_that_are_not_blank(comparison: Comparison, tmp_path: Path) -> None:
    paths, failed = pictures(comparison, tmp_path, "digits-T2")
    assert [path.name for path in paths] == [f"{kind}_digits-T2.png" for kind in ("curves", "matrix", "cost")]
    assert failed == []
    for path in paths:
        pixels = _pixels(path)
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
        assert 0.02 < float((pixels < 0.9).any(axis=-1).mean()) < 0.7


def test_without_a_finished_run_nothing_is_drawn(made: Made, tmp_path: Path) -> None:
    assert pictures(comparisons([made(status="failed")])[0], tmp_path, "digits") == ([], [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["$_v CA$", "p$5_$q", "\u6a21\u578b", "a" * 500, r"\frac{", "x\x1b[2J\ny"])
def test_a_name_is_drawn_as_it_is(made: Made, tmp_path: Path, name: str) -> None:
    (comparison,) = comparisons([made(name, dataset=name)])
    paths, failed = pictures(comparison, tmp_path, "digits")
    assert (len(paths), failed) == (3, [])
    texts = [text.get_text().replace("\n", "") for text in curves(comparison).axes[0].texts]
    shown = name if name.isprintable() else r"x\x1b[2J\ny"
    assert shown[:79] in [text[:79] for text in texts]


def test_a_picture_that_fails_costs_no_other(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(comparison: Comparison, style: Style) -> Picture:
        raise RuntimeError("no font")

    monkeypatch.setitem(PICTURES, "curves", fail)
    paths, failed = pictures(comparison, tmp_path, "digits")
    assert [path.name for path in paths] == ["matrix_digits.png", "cost_digits.png"]
    assert sorted(paths) == sorted(tmp_path.iterdir())
    assert failed == ["Not drawn: curves of digits-T2: RuntimeError: no font"]


def test_an_axis_of_percentages_ends_at_0_and_100(made: Made) -> None:
    (comparison,) = comparisons([made(counts=((10,), (0, 0)))])
    assert curves(comparison).axes[0].get_ylim() == (0.0, 100.0)


def test_a_band_ends_at_0_and_100_and_moves_no_end_of_the_axis(made: Made) -> None:
    counts = [((10,), (10, 10)), ((10,), (0, 10)), ((0,), (0, 0))]
    (comparison,) = comparisons([made(counts=one, seed=seed) for seed, one in enumerate(counts)])
    axes = curves(comparison).axes[0]
    band = np.asarray(axes.collections[0].get_paths()[0].vertices)
    assert (np.min(band[:, 1]), np.max(band[:, 1])) == (0.0, 100.0)
    low, high = axes.get_ylim()
    assert 40.0 < low < 50.0 < 200 / 3 < high < 75.0  # the means are 2/3 and 1/2


def test_a_cost_of_a_hundred_times_stands_at_the_end_with_its_number(made: Made) -> None:
    results = [made(f"method {i}") for i in range(4)]
    results[3].costs = [Cost({"training": 500.0}, 1, 1, 1) for _ in results[3].rows]
    picture = costs(comparisons(results)[0])
    assert picture is not None
    axes = picture.axes[0]
    assert axes.get_xlim() == pytest.approx((0, 1.15 * 5.0))  # the others take two times 2.5 s
    assert "1,000 s →" in [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("style", (Style(), Style(WIDTHS["column"], 7.0)))
def test_a_picture_is_as_wide_as_asked(made: Made, style: Style) -> None:
    many = [made(f"method {i} of a long name", [(9,) * row for row in range(1, 11)]) for i in range(4)]
    (comparison,) = comparisons(many)
    for draw in (curves, costs, matrices):
        picture = draw(comparison, style)
        assert picture is not None
        assert picture.extent.width == pytest.approx(style.width, abs=0.05)


def _pdf_text(path: Path) -> str:
    """Return the text of a PDF, whose fonts have two bytes for a letter, those of Unicode."""
    content = path.read_bytes()
    assert b"/FontFile2" in content  # the font itself is in the file
    packed = re.findall(rb"/FlateDecode.*?stream\r?\n(.*?)\r?\nendstream", content, re.DOTALL)
    drawn = b"".join(stream for stream in map(zlib.decompress, packed) if b" Tf" in stream)
    texts = []
    for block in re.findall(rb"BT\n(.*?)\nET", drawn, re.DOTALL):
        strings = re.findall(rb"\(((?:\\.|[^\\()])*)\)", block, re.DOTALL)
        texts.append(re.sub(rb"\\(.)", rb"\1", b"".join(strings)).decode("utf-16-be"))
    return " ".join(texts)


def test_text_in_a_pdf_and_an_svg_is_text(comparison: Comparison, tmp_path: Path) -> None:
    pdf, svg = curves(comparison).written(tmp_path / "curves", ("pdf", "svg"))
    (matrix,) = matrices(comparison).written(tmp_path / "matrix", ("pdf",))
    drawn = ElementTree.fromstring(svg.read_text())
    texts = {text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")}
    labels = {entry.label for entry in comparison.entries}
    assert {*labels, "experiences learned", "digits, 2 experiences"} <= texts
    for path in (pdf, matrix):
        text = _pdf_text(path)
        assert all(part in text for part in ("digits, 2 experiences", *labels)), text


def test_equal_pictures_are_equal_files(comparison: Comparison, tmp_path: Path) -> None:
    contents = []
    for name in ("first", "second"):
        paths = curves(comparison).written(tmp_path / name, ("pdf", "svg"))
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1]


def test_a_picture_without_room_for_its_labels_is_one_sentence(made: Made, tmp_path: Path) -> None:
    (comparison,) = comparisons([made("a_name_without_an_end")])
    _, failed = pictures(comparison, tmp_path, "digits", Style(1.0, 20.0))
    assert any("leave no room in 1 inches: give a larger --figure-width" in line for line in failed)


def test_curves_are_mean_accuracies_over_classes_seen(comparison: Comparison) -> None:
    lines = [list(map(float, np.asarray(line.get_ydata()))) for line in curves(comparison).axes[0].lines]
    assert [82.5 + 12.5, 70.0] in lines  # of LoRA: (90 + 100) / 2, then (65 + 75) / 2
    assert [80.0, 65.0] in lines


def test_joint_is_a_horizontal_line_at_its_final_accuracy(comparison: Comparison) -> None:
    (joint,) = [line for line in curves(comparison).axes[0].lines if line.get_linestyle() == "--"][:1]
    assert list(np.asarray(joint.get_ydata())) == [95.0, 95.0]


def test_matrices_hold_the_mean_of_each_cell_learned(comparison: Comparison) -> None:
    joint, lora, ncm, _bar = matrices(comparison).axes
    assert [text.get_text() for text in joint.texts if text.get_text().isdigit()] == ["90", "100"]
    assert [text.get_text() for text in lora.texts] == ["95", "60", "80"]
    assert [text.get_text() for text in ncm.texts] == ["80", "80", "50"]


def test_matrices_share_one_colour_scale(comparison: Comparison) -> None:
    limits = {axes.collections[0].get_clim() for axes in matrices(comparison).axes[:-1]}
    assert limits == {(50.0, 100.0)}


def test_a_long_stream_has_no_numbers_in_its_cells(made: Made) -> None:
    (comparison,) = comparisons([made(counts=[(9,) * i for i in range(1, 21)])])
    assert all(not text.get_text().isdigit() for text in matrices(comparison).axes[0].texts)


def test_a_stream_of_one_experience_is_drawn(made: Made, tmp_path: Path) -> None:
    assert pictures(comparisons([made(counts=((9,),))])[0], tmp_path, "digits")[1] == []


def test_a_picture_states_how_many_entries_it_leaves_out(made: Made) -> None:
    many = [made(f"strategy {i}", ((9,), (5, i % 10))) for i in range(MOST_DRAWN + 3)]
    figure = curves(comparisons(many)[0])
    assert any("3 more in the table" in text.get_text() for text in figure.axes[0].texts)


@given(positions)
def test_spread_keeps_order_gap_and_limits(heights: Sequence[float]) -> None:
    moved = spread(heights, gap=5.0, low=0.0, high=100.0)
    placed = [moved[index] for index in sorted(range(len(heights)), key=lambda index: heights[index])]
    assert all(after - before > 5.0 - 1e-9 for before, after in pairwise(placed))
    assert min(placed) > -1e-9
    assert max(placed) < 100.0 + 1e-9


@given(positions)
def test_spread_moves_nothing_that_has_space(heights: Sequence[float]) -> None:
    distant = [40.0 * index + height / 10 for index, height in enumerate(heights)]
    moved = spread(distant, gap=5.0, low=-math.inf, high=math.inf)
    assert moved == pytest.approx(distant)
