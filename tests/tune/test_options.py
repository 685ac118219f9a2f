from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cl_bench.__main__ import REFUSED, main
from cl_bench.tune.study import Plan


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that the command would run."""
    found: list[Plan] = []

    def tune(plans: list[Plan], *_: Any) -> dict[str, None]:
        found.extend(plans)
        return {}  # as if a trial had failed

    monkeypatch.setattr("cl_bench.tune.command.tune", tune)
    return found


def test_without_options_a_study_has_twelve_trials_on_the_first_three(planned: list[Plan]) -> None:
    assert main(["tune", "lora", "toy"]) == 1
    (plan,) = planned
    assert (plan.unit, plan.budget, plan.on, plan.metric) == ("trials", 12, "first:3", "maa/sample")
    assert plan.record == Path("results/tuning/lora-toy.json")
    assert [setting.key for setting in plan.space.settings] == ["optimizer.lr", "head_lr"]


def test_options_reach_the_plan_and_other_keys_every_trial(planned: list[Plan], tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("rank: {low: 1, high: 4}")
    words = ["--space", str(space), "--epochs", "40", "--on", "all", "--metric", "ACC", "--rank=3"]
    main(["tune", "lora", "toy", *words, "--results", str(tmp_path), "--seed", "7", "--order", "numpy:1"])
    (plan,) = planned
    assert (plan.unit, plan.budget, plan.on, plan.metric) == ("epochs", 40, "all", "acc/sample")
    cell = plan.cell({"rank": 2})
    assert cell.overrides == (
        "--rank=3",
        "--rank=2",
        "--val_fraction=0.2",
        "--order=numpy:1",
        "--seed=7",
        f"--results={tmp_path}/.trials",
    )


def test_words_that_are_not_settings_are_refused(
    planned: list[Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "lora", "toy", "--rank", "4"]) == REFUSED
    assert "'--rank' is not a setting: write --KEY=VALUE" in capsys.readouterr().err
    assert planned == []
