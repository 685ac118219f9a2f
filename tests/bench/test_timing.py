from __future__ import annotations

from itertools import count

import numpy as np
import pytest
import torch
from scipy.stats import binom

from cl_bench.bench import timing
from cl_bench.bench.timing import alternating, matrix_rate, ratios, spread


def test_every_call_is_made_once_a_round_and_once_to_warm_up() -> None:
    made: list[str] = []
    timed = alternating({name: lambda name=name: made.append(name) for name in "abc"}, rounds=4)  # type: ignore[misc]
    assert all(sorted(made[start : start + 3]) == list("abc") for start in range(0, 15, 3))
    assert len({tuple(made[start : start + 3]) for start in range(0, 15, 3)}) > 1
    assert [len(measurement.times) for measurement in timed.values()] == [4, 4, 4]


def test_what_slows_the_machine_for_a_round_leaves_the_ratio_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, slow = [0.0], count(1)
    monkeypatch.setattr(timing, "timer", lambda: clock[0])

    def taking(seconds: float) -> None:
        clock[0] += seconds * (10 if next(slow) > 8 else 1)

    timed = alternating({"a": lambda: taking(3.0), "b": lambda: taking(2.0)}, rounds=7)
    assert ratios(timed["a"].times, timed["b"].times) == pytest.approx((1.5, 1.5, 1.5))


def test_a_call_that_sees_several_batches_is_timed_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing, "timer", lambda: clock[0])

    def taking(seconds: float) -> None:
        clock[0] += seconds

    timed = alternating({"pass": lambda: taking(6.0), "step": lambda: taking(2.0)}, 3, {"pass": 4})
    assert ratios(timed["pass"].times, timed["step"].times) == pytest.approx((0.75, 0.75, 0.75))


@pytest.mark.parametrize("number", [6, 7, 12, 25])
def test_the_interval_holds_the_median_with_at_least_95_percent_and_is_the_shortest_that_does(
    number: int,
) -> None:
    found = spread([float(value) for value in range(1, number + 1)])
    outside = int(found.low) - 1  # values on either side of it
    assert found.low - 1 == number - found.high
    assert 1 - 2 * binom.cdf(outside, number, 0.5) >= 0.95
    assert 1 - 2 * binom.cdf(outside + 1, number, 0.5) < 0.95
    assert found.median == np.median(np.arange(1, number + 1))


def test_a_matrix_rate_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_SIDE", {"cpu": 64})
    monkeypatch.setattr(timing, "_SECONDS", 0.01)
    assert 1e6 < matrix_rate(torch.device("cpu"), torch.float32) < 1e15
