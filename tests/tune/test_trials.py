from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from cl_bench.grid.work import in_this_process
from cl_bench.results.result import read
from cl_bench.tune.space import space_of
from cl_bench.tune.study import Plan, studies
from cl_bench.tune.trials import Bound, Trial, score


def trial(folder: Path, bound: Bound | None, on: str = "first:3") -> Trial:
    plan = Plan("linear_probe", "toy", space_of({}), "trials", 1, on=on, results=folder)
    cell = plan.cell({})
    return Trial(cell, cell.configuration(), settings={}, metric="maa/sample", bound=bound)


def test_a_trial_below_its_bound_stops_and_counts_up_to_there(tmp_path: Path) -> None:
    behind = trial(tmp_path / "cut", Bound("maa/sample", after=2, worst=101.0))
    outcome = in_this_process(behind.job(waits=False))
    assert outcome.error is not None
    assert "Pruned: maa/sample is " in outcome.error
    assert behind.error(outcome) is None
    whole = trial(tmp_path / "whole", None)
    assert in_this_process(whole.job(waits=False)).error is None

    cut, full = behind.score(), whole.score()
    assert cut is not None
    assert full is not None
    assert (cut.pruned, cut.experiences, full.pruned, full.experiences) == (True, 2, False, 3)
    assert cut.value == full.by_experience[1]
    # The study of another machine may have let it finish: it counts as pruned all the same.
    again = trial(tmp_path / "whole", behind.bound).score()
    assert again is not None
    assert (again.value, again.experiences, again.epochs) == (cut.value, 2, cut.epochs)


def test_the_first_experiences_are_those_of_the_whole_stream(tmp_path: Path) -> None:
    results = {}
    for on in ("first:2", "all"):
        one = trial(tmp_path, None, on)
        assert in_this_process(one.job(waits=False)).error is None
        results[on] = read(one.configuration.folder / "result.json")
    first, whole = results.values()
    assert first.num_experiences == 2
    assert whole.num_experiences == 3
    assert first.rows == whole.rows[:2]
    assert first.class_names == whole.class_names[:4]
    assert first.protocol.fingerprint != whole.protocol.fingerprint
    with pytest.raises(ValueError, match="first_experiences is 4 of 3 experiences: choose 1 to 3"):
        trial(tmp_path, None, "first:4").configuration.datamodule.setup()


def test_forgetting_is_the_score_of_a_trial_that_is_evaluated_twice(tmp_path: Path) -> None:
    one = replace(trial(tmp_path, None), metric="bwt/gem")
    assert in_this_process(one.job(waits=False)).error is None
    result = read(next(tmp_path.rglob("result.json")))
    assert score(result, "acc/sample", 1) == result.metrics_after(0)["acc/sample"]
    assert math.isnan(score(result, "bwt/gem", 1))
    ended = one.score()
    assert ended is not None
    assert ended.value == result.metrics()["bwt/gem"] == ended.by_experience[-1]
    short = replace(trial(tmp_path, None, "first:1"), metric="bwt/gem")
    assert in_this_process(short.job(waits=False)).error is None
    with pytest.raises(ValueError, match="bwt/gem is not defined after 1 experiences of linear probe"):
        short.score()
    plan = Plan(
        "linear_probe", "toy", space_of({}), "trials", 1, on="first:1", results=tmp_path, metric="bwt/gem"
    )
    with pytest.raises(
        ValueError, match="bwt/gem needs two evaluations, and a trial of linear_probe has one"
    ):
        studies([plan])
