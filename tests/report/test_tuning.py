"""Rows marked by how their settings were chosen, and the studies behind those that were tuned."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cl_bench.report.command import report
from cl_bench.report.comparison import comparisons
from cl_bench.report.page import page
from cl_bench.report.tables import tables
from cl_bench.report.text import latex, markdown
from cl_bench.report.tuning import best_so_far, sensitivity_columns, tuned_columns
from cl_bench.results.result import FILE_NAME, Result, read
from cl_bench.results.tuning import Sensitivity, Tuning

Made = Callable[..., Result]
METRICS = ("acc/sample", "maa/sample")

STUDY = Tuning(
    strategy="lora",
    dataset="digits",
    space={"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "rank": {"choices": [4, 8]}},
    budget={"trials": 5.0},
    on="first:3",
    metric="maa/sample",
    val_fraction=0.2,
    seed=0,
    order="identity",
    fixed=[],
    settings={"optimizer.lr": [0.001, 0.002, 0.01, 0.003, 0.004], "rank": [4, 8, 4, 8, None]},
    scores=[50.0, 40.0, None, 70.0, 60.0],
    experiences=[3, 3, 1, 2, 3],
    spent={"trials": 5.0, "epochs": 12.0, "seconds": 30.0},
    best=4,
    runner_up=0,
    sensitivity=Sensitivity("optimizer.lr", [0.3, 1.0, 3.0], [57.5, 60.0, None]),
    importance={"optimizer.lr": 0.75, "rank": 0.25},
)


def tuned(made: Made, **study: Any) -> Result:
    record = asdict(replace(STUDY, **study))
    return made(setting="tuned", config={"lr": 0.004}, provenance={"settings": "tuned", "tuning": record})


@pytest.fixture
def results(made: Made) -> list[Result]:
    return [
        made("InfLoRA", provenance={"settings": "published"}),
        made("LoRA (merge)", provenance={"settings": "by hand"}),
        tuned(made),
    ]


def test_the_best_so_far_passes_over_trials_that_were_not_completed() -> None:
    assert best_so_far(STUDY) == [50.0, 50.0, 50.0, 50.0, 60.0]
    assert best_so_far(replace(STUDY, metric="forgetting/chaudhry"))[:2] == [50.0, 40.0]  # lower is better
    assert math.isnan(best_so_far(replace(STUDY, scores=[None, 1.0, 2.0, 3.0, 4.0]))[0])


def test_every_row_names_how_its_settings_were_chosen(results: list[Result], made: Made) -> None:
    shown = tables(comparisons(results), METRICS)
    rows = {
        cells[1].strip(): cells[2].strip()
        for line in markdown(shown).splitlines()
        if len(cells := line.split("|")) > 4 and "(1)" in line and "−" not in line
    }
    assert rows == {
        "InfLoRA": "published settings",
        "LoRA (merge)": "by hand",
        "LoRA (merge), tuned": "tuned here",
    }
    assert "LoRA (merge), tuned (tuned here)" in latex(shown)
    assert "| settings |" not in markdown(tables(comparisons([made()]), METRICS))  # an older result


def test_studies_and_sensitivities_are_tables(results: list[Result]) -> None:
    (comparison,) = comparisons(results)
    assert dict(tuned_columns(comparison)) == {
        "strategy": "LoRA (merge), tuned",
        "seen": "first:3",
        "budget": "5 trials",
        "trials": "5",
        "epochs": "12",
        "score": "maa/sample",
        "as configured": "50.00",
        "best": "60.00",
        "runner-up": "50.00",
        "best settings": "optimizer.lr 0.004",
    }
    assert sensitivity_columns(comparison) == [
        ["strategy", "LoRA (merge), tuned"],
        ["learning rate", "optimizer.lr"],
        ["0.3×", "-2.50"],
        ["1×", "60.00"],
        ["3×", "not finite"],
    ]


def test_pictures_of_studies_are_drawn_and_go_with_them(
    results: list[Result], made: Made, tmp_path: Path
) -> None:
    for number, result in enumerate(results):
        result.write(tmp_path / str(number))
    written = report(tmp_path, "md")
    names = {path.name.partition("_")[0] for path in written.files}
    assert {"tuning", "settings"} <= names
    assert written.notices == []
    for number in range(len(results)):
        made("InfLoRA").write(tmp_path / str(number))
    assert not {"tuning", "settings"} & {path.name.partition("_")[0] for path in report(tmp_path, "md").files}
    assert not list(tmp_path.glob("report/tuning_*"))


def test_the_page_has_the_trials_of_every_study(results: list[Result]) -> None:
    html = page(tables(comparisons(results), METRICS), "results")
    payload = html.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    (benchmark,) = json.loads(payload)["benchmarks"]
    studies = {entry["label"]: entry["study"] for entry in benchmark["entries"]}
    assert studies["InfLoRA"] is None
    study = studies["LoRA (merge), tuned"]
    assert study["best"] == [50.0, 50.0, 50.0, 50.0, 60.0]
    assert study["pruned"] == [False, False, True, True, False]
    assert study["settings"]["rank"] == {"values": [4, 8, 4, 8, None], "log": False, "importance": 0.25}
    assert benchmark["sensitivity"][2] == ["0.3×", "-2.50"]


@pytest.mark.parametrize(
    ("provenance", "sentence"),
    (
        ({"settings": "guessed"}, "settings"),
        ({"tuning": {"strategy": "lora"}}, "dataset: Field required"),
        ({"tuning": asdict(replace(STUDY, best=9))}, "its best is not one of its 5 trials"),
    ),
)
def test_a_result_with_a_broken_study_is_refused(
    provenance: dict[str, Any], sentence: str, made: Made, tmp_path: Path
) -> None:
    made(provenance=provenance).write(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        read(tmp_path / FILE_NAME)


def test_a_hostile_study_is_drawn_or_named(made: Made, tmp_path: Path) -> None:
    space = {"a\u202eb$_{": {"choices": ["<script>", "x"]}, "b": {"log": True}}
    settings = {"a\u202eb$_{": ["<script>", None, 3, "x", [1]], "b": [0, -1, 1e15, True, "1"]}
    tuned(made, space=space, settings=settings, on="\x1b[31m", sensitivity=None).write(tmp_path)
    assert "\x1b" not in report(tmp_path, "md").text
    assert "\x1b" not in latex(tables(comparisons([read(tmp_path / FILE_NAME)]), METRICS))
