from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile

from cl_bench.report.comparison import comparisons
from cl_bench.report.tables import tables
from cl_bench.report.text import latex, markdown
from cl_bench.results.result import Result

Made = Callable[..., Result]

METRICS = ("acc/sample", "maa/sample", "bwt/gem", "forgetting/chaudhry")


def _markdown(results: Iterable[Result], metrics: Sequence[str] = METRICS) -> str:
    return markdown(tables(comparisons(results), metrics))


def _grid(text: str, heading: str = "strategy") -> list[list[str]]:
    """Return the cells of the first table whose first column has this heading."""
    lines = text[text.index(f"| {heading}") :].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in takewhile(_is_row, lines)]


def _is_row(line: str) -> bool:
    return line.startswith("|")


def _costs(text: str) -> list[list[str]]:
    return _grid(text[text.index("Costs, means over runs") :])


def test_a_cell_holds_mean_deviation_and_number(made: Made) -> None:
    # By hand: final accuracies 65 and 75; means 77.5 and 87.5; the first experience falls by 40 and by 30.
    header, _, row = _grid(_markdown([made(seed=1), made(counts=((10,), (7, 8)), seed=2)]))
    assert header == ["strategy", *METRICS]
    assert [cell.strip("*") for cell in row] == [
        "LoRA (merge)",
        "70.00 ± 7.07 (2)",
        "82.50 ± 7.07 (2)",
        "-35.00 ± 7.07 (2)",
        "35.00 ± 7.07 (2)",
    ]


def test_costs_are_listed_by_phase_with_a_dash_if_not_measured(made: Made) -> None:
    header, _, row = _costs(_markdown([made()]))
    assert dict(zip(header, row, strict=True)) == {
        "strategy": "LoRA (merge)",
        "seconds": "5",
        "data passes": "–",
        "training": "4",
        "evaluation": "1",
        "checkpoints": "–",
        "peak MB": "1,000",
        "parameters": "101",
        "stored MB": "1.5",
    }


def test_every_mean_has_an_interval_or_the_reason_for_none(made: Made) -> None:
    # By hand: accuracies 65, 75 and 70 have a standard error of 2.887, and t(0.975, 2) is 4.303. On the scale
    # of log odds, around log(0.7 / 0.3) = 0.847, that is 0.124 / (0.7 × 0.3) = 0.591.
    counts = (((9,), (5, 8)), ((10,), (7, 8)), ((10,), (6, 8)))
    results = [made(counts=of_one, seed=seed) for seed, of_one in enumerate(counts)]
    text = _markdown([*results, made("NCM", seed=1)])
    rows = {row[0]: row for row in _grid(text[text.index("95 % logit interval of") :])}
    assert rows["LoRA (merge)"][1] == "[56.36, 80.83]"
    assert rows["NCM"][1] == "n too small"


def test_single_runs_have_no_interval(made: Made) -> None:
    assert "Intervals of the means: n too small" in _markdown([made(), made("NCM")])


def test_a_difference_may_be_noise(made: Made) -> None:
    results = [made("tied", ((9,), (5, 8 + seed % 2)), seed=seed) for seed in range(4)]
    results += [made("even", ((9,), (5, 8 + (seed + 1) % 2)), seed=seed) for seed in range(4)]
    (header, _, row) = _grid(_markdown(results), "first − second")
    cells = dict(zip(header, row, strict=True))
    assert cells["first − second"] == "even − tied"
    assert cells["Δ (shared blocks)"] == "+0.00 (4)"
    assert cells["win/tie/loss"] == "2/0/2"
    assert cells["p (Holm)"] == "n too small"
    assert cells["verdict"] == "possibly noise"


def test_many_rows_are_compared_with_the_best_only(made: Made) -> None:
    results = [made(f"s{number}", ((9,), (number, 8)), seed=seed) for number in range(8) for seed in (1, 2)]
    text = _markdown(results)
    assert [row[0] for row in _grid(text, "first − second")[2:]] == [
        f"s7 − s{number}" for number in range(6, -1, -1)
    ]
    assert "21 more pairs in the CSV, JSON and HTML" in text


def test_one_run_has_no_deviation(made: Made) -> None:
    assert _grid(_markdown([made()]))[2][1] == "**65.00 (1)**"


def test_joint_is_marked_first_and_has_no_metrics_over_the_stream(made: Made) -> None:
    text = _markdown([made(), made("LoRA (joint)", (None, (9, 10)), regime="joint")])
    assert _grid(text)[2][:5] == ["LoRA (joint) †", "95.00 (1)", "–", "–", "–"]
    assert "† Upper bound" in text


def test_the_best_below_joint_is_bold_in_its_own_direction(made: Made) -> None:
    results = [
        made("accurate", ((10,), (7, 8))),
        made("steady", ((6,), (6, 6))),
        made("all (joint)", (None, (9, 10)), regime="joint"),
    ]
    rows = {row[0]: row[1:5] for row in _grid(_markdown(results))[2:]}
    assert rows["accurate"] == ["**75.00 (1)**", "**87.50 (1)**", "-30.00 (1)", "30.00 (1)"]
    assert rows["steady"] == ["60.00 (1)", "60.00 (1)", "**0.00 (1)**", "**0.00 (1)**"]
    assert not any("**" in cell for cell in rows["all (joint) †"])


def test_means_that_print_equal_are_equally_bold(made: Made) -> None:
    rows = _grid(_markdown([made("one"), made("two")]))[2:]
    assert rows[0][1] == rows[1][1] == "**65.00 (1)**"


def test_a_row_that_lacks_a_block_is_not_ranked_with_complete_ones(made: Made) -> None:
    results = [made("whole", seed=1), made("whole", seed=2), made("lucky", ((10,), (10, 10)), seed=1)]
    text = _markdown(results)
    rows = {row[0]: row[1] for row in _grid(text)[2:]}
    assert rows == {"lucky": "100.00 (1 of 2)", "whole": "**65.00 ± 0.00 (2)**"}
    assert "Rows that lack seeds or class orders which another row finished are not ranked." in text
    assert "not ranked." not in _markdown(results[:2])


def test_unequal_protocols_never_share_a_table(made: Made) -> None:
    text = _markdown([made("one"), made("two", identity={"image_size": 64}), made("three", dataset="toy")])
    sections = text.split("\n## ")[1:]
    assert [sum(name in section for name in ("| one", "| two", "| three")) for section in sections] == [
        1,
        1,
        1,
    ]
    assert "share no table because they differ in image_size" in text


def test_benchmarks_on_other_weights_share_no_table(made: Made) -> None:
    other = {"backbone": {"model": "vision_transformer", "options": {"depth": 2}, "weights": "pretrained"}}
    text = _markdown([made("one"), made("two", dataset="toy", identity=other)])
    assert [section.splitlines()[0] for section in f"\n{text}".split("\n## ")[1:]] == ["digits-T2", "toy-T2"]
    assert (
        "Not all of digits-T2, toy-T2 share a table, because they differ in backbone.weights "
        "(random in digits-T2; pretrained in toy-T2)." in text
    )


def test_benchmarks_that_differ_only_in_their_data_share_a_table(made: Made) -> None:
    of_the_data = {"image_size": 64, "train_images": "other", "variants": {"split": "own"}}
    text = _markdown([made("one"), made("two", dataset="toy", identity=of_the_data)])
    assert text.startswith("## digits-T2, toy-T2")


def test_benchmarks_of_one_protocol_share_a_table(made: Made) -> None:
    results = [made(), made(dataset="toy", counts=((10,), (7, 8))), made("NCM", dataset="toy")]
    header, _, *rows = _grid(_markdown(results, ["acc/sample"]))
    assert header[:3] == ["strategy", "digits-T2 acc/sample", "toy-T2 acc/sample"]
    assert [row[:3] for row in rows] == [
        ["LoRA (merge)", "**65.00 (1)**", "**75.00 (1)**"],
        ["NCM", "not run", "65.00 (1)"],
    ]


def test_a_cell_without_a_finished_run_shows_its_status(made: Made) -> None:
    results = [
        made(),
        made("KeepLoRA", status="failed", error="OSError: no space left"),
        made("LoDA", status="diverged", seed=1),
        made("LoDA", status="running", seed=2),
        made("NCM", dataset="toy"),
    ]
    text = _markdown(results, ["acc/sample"])
    assert {row[0]: row[1:] for row in _grid(text)[2:]} == {
        "LoRA (merge)": ["**65.00 (1 of 2)**", "not run"],
        "KeepLoRA": ["failed", "not run"],
        "LoDA": ["diverged, running", "not run"],
        "NCM": ["not run", "**65.00 (1)**"],
    }
    assert "- KeepLoRA, seed 1, class order identity: failed: OSError: no space left" in text


def test_every_metric_shown_is_defined(made: Made) -> None:
    text = _markdown([made()], ["within/sample", "forgetting/avalanche"])
    assert "\n- within/sample: " in text
    assert "\n- forgetting/avalanche: " in text
    assert "\n- acc/sample: " not in text


def test_a_bar_in_a_label_does_not_break_the_table(made: Made) -> None:
    assert "| left \\| right |" in _markdown([made("left | right")])


def _latex(results: Iterable[Result]) -> str:
    return latex(tables(comparisons(results), ("acc/sample", "bwt/gem")))


def _latex_rows(text: str) -> dict[str, list[str]]:
    lines = (line.removesuffix(r" \\").split(" & ") for line in text.splitlines() if line.endswith(r"\\"))
    return {label: cells for label, *cells in reversed(list(lines))}


def test_best_is_bold_second_underlined_and_the_bound_neither(made: Made) -> None:
    results = [
        made("first", ((9,), (9, 9))),
        made("second", ((9,), (7, 8))),
        made("third", ((9,), (5, 8))),
        made("all (joint)", (None, (9, 10)), regime="joint"),
    ]
    rows = _latex_rows(_latex(results))
    assert rows["first"][0] == r"\textbf{90.00}"
    assert rows["second"][0] == r"\underline{75.00}"
    assert rows["third"][0] == "65.00"
    assert rows[r"all (joint)$^\dagger$"] == ["95.00", "--"]


def test_rules_are_those_of_booktabs_and_environments_are_closed(made: Made) -> None:
    text = _latex([made(), made("NCM"), made(dataset="toy")])
    assert r"\hline" not in text
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 4
    assert r"\cmidrule(lr){2-3} \cmidrule(lr){4-5}" in text
    begun = re.findall(r"\\begin{(.*?)}", text)
    assert sorted(begun) == sorted(re.findall(r"\\end{(.*?)}", text))
    assert text.count("{") == text.count("}")


def test_every_line_of_a_table_has_its_columns(made: Made) -> None:
    text = _latex([made(), made("NCM", status="failed"), made("x & y_z", dataset="toy")])
    for body in re.findall(r"\\midrule(.*?)\\bottomrule", text, flags=re.DOTALL):
        counts = {len(re.findall(r"(?<!\\) & ", line)) for line in body.splitlines() if "&" in line}
        assert len(counts) == 1


def test_runs_that_did_not_finish_show_status_and_error(made: Made) -> None:
    text = _latex([made(), made("NCM", status="diverged", error="NaN in step 3")])
    assert r"NCM & \emph{diverged} & \emph{diverged}" in text
    assert "NCM, seed 1, class order identity: diverged: NaN in step 3" in text
