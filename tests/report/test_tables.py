from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence

from cl_bench.report.comparison import comparisons
from cl_bench.report.tables import markdown, tables, tidy, tidy_absences
from cl_bench.results import Result

Made = Callable[..., Result]

METRICS = ("acc/sample", "maa/sample", "bwt/gem", "forgetting/chaudhry")


def _markdown(results: Iterable[Result], metrics: Sequence[str] = METRICS) -> str:
    return markdown(tables(comparisons(results), metrics))


def _cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def _records(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_cell_holds_mean_deviation_and_number(made: Made) -> None:
    # By hand: final accuracies 65 and 75; means 77.5 and 87.5; the first experience falls by 40 and by 30.
    header, _, row = _cells(_markdown([made(seed=1), made(counts=((10,), (7, 8)), seed=2)]))
    assert header == ["strategy", *METRICS, "seconds", "parameters", "stored MB"]
    assert [cell.strip("*") for cell in row] == [
        "LoRA (merge)",
        "70.00 ± 7.07 (2)",
        "82.50 ± 7.07 (2)",
        "-35.00 ± 7.07 (2)",
        "35.00 ± 7.07 (2)",
        "5",
        "101",
        "1.5",
    ]


def test_one_run_has_no_deviation(made: Made) -> None:
    assert _cells(_markdown([made()]))[2][1] == "**65.00 (1)**"


def test_joint_is_marked_first_and_undefined_on_the_way(made: Made) -> None:
    text = _markdown([made(), made("LoRA (joint)", (None, (9, 10)), regime="joint")])
    assert _cells(text)[2][:5] == ["LoRA (joint) †", "95.00 (1)", "–", "–", "–"]
    assert "† Upper bound" in text


def test_the_best_below_joint_is_bold_in_its_own_direction(made: Made) -> None:
    results = [
        made("accurate", ((10,), (7, 8))),
        made("steady", ((6,), (6, 6))),
        made("all (joint)", (None, (9, 10)), regime="joint"),
    ]
    rows = {row[0]: row[1:5] for row in _cells(_markdown(results))[2:]}
    assert rows["accurate"] == ["**75.00 (1)**", "**87.50 (1)**", "-30.00 (1)", "30.00 (1)"]
    assert rows["steady"] == ["60.00 (1)", "60.00 (1)", "**0.00 (1)**", "**0.00 (1)**"]
    assert not any("**" in cell for cell in rows["all (joint) †"])


def test_what_is_equal_as_printed_is_equally_bold(made: Made) -> None:
    rows = _cells(_markdown([made("one"), made("two")]))[2:]
    assert rows[0][1] == rows[1][1] == "**65.00 (1)**"


def test_unequal_protocols_never_share_a_table(made: Made) -> None:
    text = _markdown([made("one"), made("two", identity={"image_size": 64}), made("three", dataset="toy")])
    sections = text.split("\n## ")[1:]
    assert [sum(name in section for name in ("| one", "| two", "| three")) for section in sections] == [
        1,
        1,
        1,
    ]
    assert "share no table because they differ in image_size" in text


def test_benchmarks_of_one_protocol_stand_side_by_side(made: Made) -> None:
    results = [made(), made(dataset="toy", counts=((10,), (7, 8))), made("NCM", dataset="toy")]
    header, _, *rows = _cells(_markdown(results, ["acc/sample"]))
    assert header[:3] == ["strategy", "digits-T2 acc/sample", "toy-T2 acc/sample"]
    assert [row[:3] for row in rows] == [
        ["LoRA (merge)", "**65.00 (1)**", "**75.00 (1)**"],
        ["NCM", "", "65.00 (1)"],
    ]


def test_a_failed_cell_is_listed_and_its_row_left_empty(made: Made) -> None:
    text = _markdown([made(), made("KeepLoRA", status="failed", error="OSError: no space left")])
    assert _cells(text)[3] == ["KeepLoRA"] + [""] * 7
    assert "- KeepLoRA, seed 1, class order identity: failed: OSError: no space left" in text


def test_every_metric_shown_is_defined_below(made: Made) -> None:
    text = _markdown([made()], ["within/sample", "forgetting/avalanche"])
    assert "\n- within/sample: " in text
    assert "\n- forgetting/avalanche: " in text
    assert "\n- acc/sample: " not in text


def test_a_bar_in_a_label_does_not_break_the_table(made: Made) -> None:
    assert "| left \\| right |" in _markdown([made("left | right")])


def test_tidy_lines_hold_one_statistic_each(made: Made) -> None:
    results = [made(seed=1), made(counts=((10,), (7, 8)), seed=2)]
    records = _records(tidy(tables(comparisons(results), METRICS)))
    assert [record["metric"] for record in records] == [
        *METRICS,
        "seconds",
        "trainable_parameters",
        "stored_megabytes",
    ]
    assert records[0] == {
        "benchmark": "digits-T2",
        "fingerprint": results[0].protocol.fingerprint,
        "strategy": "LoRA (merge)",
        "label": "LoRA (merge)",
        "group": results[0].group,
        "metric": "acc/sample",
        "mean": "70.0",
        "std": "7.071068",
        "n": "2",
    }


def test_tidy_leaves_empty_what_is_undefined(made: Made) -> None:
    joint = made(counts=(None, (9, 10)), regime="joint")
    acc, maa, *_ = _records(tidy(tables(comparisons([joint]), METRICS)))
    assert (acc["mean"], acc["std"], acc["n"]) == ("95.0", "", "1")
    assert (maa["mean"], maa["std"], maa["n"]) == ("", "", "0")


def test_tidy_absences_name_each_run_in_no_mean(made: Made) -> None:
    results = [made(seed=1), made(seed=2, status="diverged", error="NaN, in step 3"), made("NCM", seed=1)]
    laid_out = tables(comparisons(results), METRICS)
    assert [
        (record["label"], record["seed"], record["status"], record["error"])
        for record in _records(tidy_absences(laid_out) or "")
    ] == [("LoRA (merge)", "2", "diverged", "NaN, in step 3"), ("NCM", "2", "missing", "")]


def test_nothing_is_absent_from_a_complete_grid(made: Made) -> None:
    assert tidy_absences(tables(comparisons([made(seed=1), made(seed=2)]), METRICS)) is None
