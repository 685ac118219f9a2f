from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cl_bench.tune.space import Space, space_of
from cl_bench.tune.study import Plan, Study
from cl_bench.tune.trials import Score, Trial

RATES = {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}}


def planned(space: Space, tmp_path: Path, **changed: object) -> Plan:
    given = {"unit": "trials", "budget": 12, "on": "first:3", "metric": "maa/sample"} | changed
    return Plan("lora", "toy", space, results=tmp_path, **given)  # type: ignore[arg-type]


def finished(plan: Plan, scored: Callable[[Trial], Score], monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study whose trials end as ``scored`` has it, without being run."""
    study = Study(plan, plan.cell({}).configuration())
    monkeypatch.setattr(Trial, "score", scored)
    while study.ask():
        study.tell()
    return study


def of(value: float | None, by_experience: tuple[float, ...] = (), pruned: bool = False) -> Score:
    return Score(value, len(by_experience) or 3, pruned, by_experience or (0.0,), epochs=3, seconds=1.0)


def near(trial: Trial) -> Score:
    """Highest at a rate of 0.003."""
    rate = float(trial.settings["optimizer.lr"])
    return of(100 - abs(rate - 0.003) * 1e4)


def test_the_same_study_twice_proposes_the_same_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (
        finished(planned(space_of(RATES), tmp_path), near, monkeypatch).tuning() for _ in range(2)
    )
    assert first == second
    other = finished(planned(space_of(RATES), tmp_path, seed=1), near, monkeypatch).tuning()
    assert first.settings != other.settings


def test_the_first_trial_has_the_settings_of_the_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = finished(planned(space_of(RATES), tmp_path), near, monkeypatch)
    assert study.tuning().settings["optimizer.lr"][0] == 0.001  # configs/datamodules/toy.yaml
    plain = study.base.hash
    assert study.base.overridden(["--optimizer.lr=0.001"]).hash == plain


def test_the_best_is_the_earliest_of_the_highest_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([50.0, 70.0, None, 70.0, 90.0, 60.0])
    study = finished(
        planned(space_of(RATES), tmp_path, budget=6),
        lambda trial: cached(trial, lambda: of(next(scores), pruned=False)),
        monkeypatch,
    )
    assert study.tuning().scores == [50.0, 70.0, None, 70.0, 90.0, 60.0]
    assert (study.tuning().best, study.tuning().runner_up) == (4, 1)


SEEN: dict[int, Score] = {}


def cached(trial: Trial, made: Callable[[], Score]) -> Score:
    return SEEN.setdefault(id(trial), made())
