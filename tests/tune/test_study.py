from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cl_bench.results.tuning import Tuning
from cl_bench.run.configuration import Configuration
from cl_bench.tune.space import space_of
from cl_bench.tune.study import Plan, Study
from cl_bench.tune.trials import Score, Trial

RATES = {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}}


def planned(folder: Path, space: dict[str, Any] = RATES, **changed: Any) -> Plan:
    given: dict[str, Any] = {"unit": "trials", "budget": 12, "on": "first:3"} | changed
    return Plan("lora", "toy", space_of(space), results=folder, **given)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Configuration:
    return planned(tmp_path_factory.mktemp("base")).cell({}).configuration()


def ended(study: Study, scored: Callable[[Trial], Score], monkeypatch: pytest.MonkeyPatch) -> Tuning:
    """Return the record of a study whose trials end as ``scored`` has it, without being run."""
    monkeypatch.setattr(Trial, "score", scored)
    while study.ask():
        study.tell()
    record = study.tuning()
    assert record is not None
    return record


def at(value: float | None, *by_experience: float, pruned: bool = False) -> Score:
    return Score(
        value, 2 if pruned else 3, pruned, by_experience or (value or 0.0,) * 3, epochs=3, seconds=1.5
    )


def near(trial: Trial) -> Score:
    """Highest at a rate of 0.003."""
    return at(100 - abs(float(trial.settings["optimizer.lr"]) - 0.003) * 1e4)


def test_the_same_study_twice_proposes_the_same_trials(
    base: Configuration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (ended(Study(planned(tmp_path), base), near, monkeypatch) for _ in range(2))
    assert first == second
    other = ended(Study(planned(tmp_path, seed=1), base), near, monkeypatch)
    assert first.settings != other.settings


def test_a_larger_budget_continues_a_smaller_one(
    base: Configuration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = (
        ended(Study(planned(tmp_path, budget=budget), base), near, monkeypatch) for budget in (8, 11)
    )
    assert large.settings["optimizer.lr"][:8] == small.settings["optimizer.lr"]
    assert len(large.scores) == 11


def test_the_first_trial_has_the_settings_of_the_configs(base: Configuration, tmp_path: Path) -> None:
    first = Study(planned(tmp_path), base).ask()[0]
    assert first.settings == {"optimizer.lr": 0.001}  # configs/datamodules/toy.yaml
    assert first.configuration.hash == base.hash


def test_the_best_is_the_earliest_of_the_highest_scores_that_were_completed(
    base: Configuration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([at(50.0), at(70.0), at(None), at(70.0), at(90.0, 80.0, 90.0, pruned=True), at(60.0)])
    study = Study(planned(tmp_path, budget=6), base)
    record = ended(study, lambda _: next(scores), monkeypatch)
    assert record.scores == [50.0, 70.0, None, 70.0, 90.0, 60.0]
    assert (record.best, record.runner_up) == (1, 3)
    assert record.experiences == [3, 3, 3, 3, 2, 3]


def test_a_trial_is_pruned_below_the_lower_quartile_of_earlier_generations(
    base: Configuration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([10.0, 20.0, 30.0, 40.0] * 2)
    study = Study(planned(tmp_path, budget=8), base)
    assert all(trial.bound is None for trial in study.ask())
    monkeypatch.setattr(Trial, "score", lambda _: at(99.0, 99.0, next(values), 99.0))
    study.tell()
    bounds = [trial.bound for trial in study.ask()]
    assert {(bound.after, bound.worst) for bound in bounds if bound} == {(2, 17.5)}  # by hand
    assert None not in bounds


@pytest.mark.parametrize(
    ("unit", "budget", "trials"), (("trials", 5, 5), ("epochs", 10, 4), ("seconds", 9.0, 6))
)
def test_no_trial_counts_once_the_budget_is_spent(
    base: Configuration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unit: str,
    budget: float,
    trials: int,
) -> None:
    record = ended(Study(planned(tmp_path, unit=unit, budget=budget), base), near, monkeypatch)
    assert len(record.scores) == trials
    assert record.budget == {unit: budget}
    assert record.spent == {"trials": trials, "epochs": 3 * trials, "seconds": 1.5 * trials}


def test_sensitivity_is_the_score_at_a_third_and_three_times_the_best_rate(
    base: Configuration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(planned(tmp_path, sensitivity=True, budget=4), base)
    record = ended(study, near, monkeypatch)
    best = record.chosen["optimizer.lr"]
    assert record.sensitivity is not None
    assert record.sensitivity.factors == [0.3, 1.0, 3.0]
    assert record.sensitivity.scores == pytest.approx(
        [100 - abs(factor * best - 0.003) * 1e4 for factor in (0.3, 1, 3)], abs=0.1
    )  # rates have three digits
    assert len(record.scores) == 4  # not part of the budget


def test_a_study_without_a_finite_loss_has_no_record(
    base: Configuration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(planned(tmp_path, sensitivity=True, budget=4), base)
    monkeypatch.setattr(Trial, "score", lambda _: at(None))
    study.ask()
    study.tell()
    assert study.ask() == []
    assert study.tuning() is None


def test_a_setting_is_left_alone_unless_its_condition_holds(
    base: Configuration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = {
        "head_start": {"choices": ["random", "means"]},
        "head_lr": {"low": 1e-3, "high": 1e-1, "log": True, "when": {"head_start": "random"}},
    }
    study = Study(planned(tmp_path, space), base)
    record = ended(study, lambda trial: at(float(len(trial.settings))), monkeypatch)
    rates = record.settings["head_lr"]
    pairs = {(start, rate is None) for start, rate in zip(record.settings["head_start"], rates, strict=True)}
    assert pairs == {("random", False), ("means", True)}


def test_trials_log_to_one_group_of_wandb_and_stay_the_same_cells(
    base: Configuration, tmp_path: Path
) -> None:
    trial = planned(tmp_path, wandb=True).cell({}).configuration()
    assert (trial.namespace.wandb, trial.namespace.wandb_group) == (True, "tuning lora-toy")
    assert trial.hash == base.hash


@pytest.mark.parametrize(
    ("changed", "sentence"),
    (
        ({"metric": "maa/sampel"}, r"unknown. Did you mean maa/sample\?"),
        ({"on": "last:3"}, "write first:3 for the first three experiences, or all"),
        ({"budget": 0}, "A budget cannot be 0 trials: give a number above 0."),
        ({"val_fraction": 0.0}, "val_fraction cannot be 0"),
    ),
)
def test_a_plan_that_no_study_can_do_is_refused(
    changed: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        planned(tmp_path, **changed)


def test_the_record_of_a_study_with_options_of_its_own_has_a_name_of_its_own(tmp_path: Path) -> None:
    usual = planned(tmp_path)
    assert usual.record == tmp_path / "tuning" / "lora-toy.json"
    assert planned(tmp_path, fixed=("--root=/data",), budget=3).record == usual.record
    own = {
        planned(tmp_path, **changed).record
        for changed in (
            {"fixed": ("--num_experiences=2",)},
            {"on": "all"},
            {"metric": "acc/sample"},
            {"order": "numpy:1993"},
        )
    }
    assert len(own | {usual.record}) == 5


def test_a_study_whose_first_trials_all_diverge_ends_without_a_record(
    base: Configuration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(planned(tmp_path, unit="seconds", budget=100.0), base)
    diverged = Score(None, 0, pruned=False, by_experience=(), epochs=1, seconds=0.0)
    monkeypatch.setattr(Trial, "score", lambda trial: diverged)
    while study.ask():
        study.tell()
    assert study.spent["trials"] == 12
    assert study.tuning() is None
