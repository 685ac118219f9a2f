from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable

from cl_bench.report.comparison import comparisons
from cl_bench.report.records import tidy, tidy_absences, tidy_differences, tree
from cl_bench.report.tables import tables
from cl_bench.results.result import COSTS, Result

Made = Callable[..., Result]

METRICS = ("acc/sample", "maa/sample", "bwt/gem", "forgetting/chaudhry")


def _records(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_tidy_lines_hold_one_statistic_each(made: Made) -> None:
    counts = (((9,), (5, 8)), ((10,), (7, 8)), ((10,), (6, 8)))
    results = [made(counts=of_one, seed=seed) for seed, of_one in enumerate(counts)]
    records = _records(tidy(tables(comparisons(results), METRICS)))
    assert [record["metric"] for record in records] == [
        *METRICS,
        *COSTS,
    ]
    assert records[0] == {
        "benchmark": "digits-T2",
        "fingerprint": results[0].protocol.fingerprint,
        "strategy": "LoRA (merge)",
        "label": "LoRA (merge)",
        "group": results[0].group,
        "metric": "acc/sample",
        "mean": "70.0",
        "std": "5.0",
        "n": "3",
        "low": "56.361254",
        "high": "80.826244",
        "bootstrap_low": "",
        "bootstrap_high": "",
    }


def test_tidy_leaves_undefined_values_empty(made: Made) -> None:
    joint = made(counts=(None, (9, 10)), regime="joint")
    acc, maa, *_ = _records(tidy(tables(comparisons([joint]), METRICS)))
    assert (acc["mean"], acc["std"], acc["n"]) == ("95.0", "", "1")
    assert (maa["mean"], maa["std"], maa["n"]) == ("", "", "0")


def test_tidy_absences_list_each_run_in_no_mean(made: Made) -> None:
    results = [made(seed=1), made(seed=2, status="diverged", error="NaN, in step 3"), made("NCM", seed=1)]
    laid_out = tables(comparisons(results), METRICS)
    assert [
        (record["label"], record["seed"], record["status"], record["error"])
        for record in _records(tidy_absences(laid_out) or "")
    ] == [("LoRA (merge)", "2", "diverged", "NaN, in step 3"), ("NCM", "2", "missing", "")]


def test_a_complete_grid_has_no_absences(made: Made) -> None:
    assert tidy_absences(tables(comparisons([made(seed=1), made(seed=2)]), METRICS)) is None


def test_tidy_differences_hold_every_pair_in_every_metric(made: Made) -> None:
    results = [made(name, seed=seed) for name in ("a", "b", "c") for seed in (1, 2, 3)]
    records = _records(tidy_differences(tables(comparisons(results), METRICS)) or "")
    assert [(record["first"], record["second"]) for record in records[:3]] == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    ]
    assert len(records) == 3 * len(METRICS)
    assert records[0]["verdict"] == "possibly noise"
    assert (records[0]["wins"], records[0]["ties"], records[0]["p"]) == ("0", "3", "")


def test_one_row_has_no_differences(made: Made) -> None:
    assert tidy_differences(tables(comparisons([made()]), METRICS)) is None


def test_the_tree_holds_every_run_with_its_values_and_provenance(made: Made) -> None:
    results = [made(seed=1), made(counts=((10,), (7, 8)), seed=2), made("NCM", status="failed")]
    (benchmark,) = json.loads(tree(tables(comparisons(results), METRICS)))["benchmarks"]
    lora, ncm = benchmark["entries"]
    assert [run["values"]["acc/sample"] for run in lora["runs"]] == [65.0, 75.0]
    assert lora["runs"][0]["provenance"] == results[0].provenance
    assert lora["statistics"]["acc/sample"]["interval"] is None
    assert ncm["statistics"]["acc/sample"]["mean"] is None
    assert [absence["status"] for absence in benchmark["absent"]] == ["failed", "missing"]
    assert benchmark["protocol"] == results[0].protocol.identity


def test_a_cell_of_csv_is_never_a_formula(made: Made) -> None:
    results = [made("=cmd|' /C calc'!A0"), made("@SUM(1)"), made("+1", status="failed", error="-2+3")]
    laid_out = tables(comparisons(results), METRICS)
    texts = (tidy(laid_out), tidy_differences(laid_out), tidy_absences(laid_out))
    cells = [cell for text in texts for line in csv.reader(io.StringIO(text)) for cell in line]
    assert "'=cmd|' /C calc'!A0" in cells
    numbers = re.compile(r"-\d+(\.\d+)?(e-\d+)?")
    assert [cell for cell in cells if cell[:1] in "=+-@" and cell and not numbers.fullmatch(cell)] == []
