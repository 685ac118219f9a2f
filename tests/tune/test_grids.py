from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cl_bench.grid.cells import Grid
from cl_bench.results.tuning import Tuning
from cl_bench.tune import grids
from cl_bench.tune.study import Plan

SETTINGS = {"lora": {"small": {"rank": 2}, "large": {"rank": 8}}}


def grid(results: Path, **changed: Any) -> Grid:
    return Grid(
        ["ncm", "lora"], ["toy"], SETTINGS, seeds=[1, 2], results=str(results), tune={"trials": 3} | changed
    )


def recorded(plan: Plan) -> Tuning:
    """A record as the study of ``plan`` would write it."""
    return Tuning(
        **plan.question,
        settings={"optimizer.lr": [0.001, 0.002, 0.003], "head_lr": [0.01, None, 0.03]},
        scores=[1.0, 2.0, 3.0],
        experiences=[3, 3, 3],
        spent={"trials": 3.0},
        best=2,
    )


def test_every_setting_of_a_strategy_has_a_study_and_seeds_share_it(tmp_path: Path) -> None:
    one = grid(tmp_path)
    plans = [grids.plan(one, cell) for cell in one.cells()]
    names = {plan.name.removesuffix(f"-{plan.name[-8:]}") if plan.fixed else plan.name for plan in plans}
    assert names == {"ncm-toy", "lora-small-toy", "lora-large-toy"}
    assert len({plan.name for plan in plans}) == 3
    assert {plan.fixed for plan in plans if "large" in plan.name} == {("--rank=8",)}
    assert {(plan.unit, plan.budget, plan.on) for plan in plans} == {("trials", 3, "first:3")}


def test_cells_start_from_the_records_and_keep_seed_and_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tune(plans: list[Plan], *_: object) -> dict[str, Tuning]:
        return {plan.name: recorded(plan) for plan in plans if "small" in plan.name}  # one study fails

    monkeypatch.setattr("cl_bench.tune.command.tune", tune)
    one = grid(tmp_path)
    (record,) = {plan.record for cell in one.cells() if "small" in (plan := grids.plan(one, cell)).name}
    cells, all_tuned = grids.tuned(one, lambda _: None, Console(quiet=True))  # type: ignore[arg-type, return-value]
    assert not all_tuned
    assert [(cell.strategy, cell.overrides) for cell in cells[:2]] == [
        ("ncm", ("--order=identity", "--seed=1", f"--results={tmp_path}")),
        (
            "lora",
            (
                "--rank=2",
                f"--tuned={record}",
                "--setting=small-tuned",
                f"--results={tmp_path}",
                "--order=identity",
                "--seed=1",
            ),
        ),
    ]
    assert len(cells) == 4  # without those of the study that failed


def test_a_dry_run_takes_only_the_records_of_the_same_question(tmp_path: Path) -> None:
    one = grid(tmp_path, untuned=True)
    plan = next(plan for cell in one.cells() if "small" in (plan := grids.plan(one, cell)).name)
    recorded(plan).write(plan.record)

    def names(of: Grid) -> list[str]:
        cells, _ = grids.tuned(of, lambda _: None, Console(quiet=True), dry_run=True)  # type: ignore[arg-type, return-value]
        return [word.partition("=")[2] for cell in cells for word in cell.overrides if "--setting" in word]

    assert names(one) == ["small-tuned", "small-tuned", "small", "large", "small", "large"]
    assert names(grid(tmp_path, trials=4)) == []


def test_two_strategies_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").write_text("model: {class_path: strategies.lora.LoRA}")
    names = ["lora", f"{tmp_path}/lora.yaml"]
    twice = Grid(names, ["toy"], results=str(tmp_path), tune={"trials": 3})
    with pytest.raises(ValueError, match="Two studies of the grid have the name lora-toy"):
        grids.tuned(twice, lambda _: None, Console(quiet=True))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("tune", "sentence"),
    (
        ({"trails": 12}, r"cannot contain 'trails'. Did you mean trials\?"),
        ({"trials": "12"}, "trials must be a int or float, not '12'"),
        ({"metric": "acc/sample"}, "needs one budget, the same for all of its strategies"),
        ({"trials": 12, "epochs": 3}, "needs one budget"),
        ({"trials": 12, "experiences": "3"}, "write first:3 for the first three experiences"),
    ),
)
def test_a_wrong_key_tune_is_refused(tune: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    wrong = Grid(["lora"], ["toy"], results=str(tmp_path), tune=tune)
    with pytest.raises(ValueError, match=sentence):
        grids.tuned(wrong, lambda _: None, Console(quiet=True))  # type: ignore[arg-type, return-value]
