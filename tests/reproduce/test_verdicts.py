from __future__ import annotations

from dataclasses import replace

import pytest

from cl_bench.report.statistics import NO_VALUES, Contrast, statistic
from cl_bench.reproduce.verdicts import Claim, Level, standing
from cl_bench.results.published import Published, rows


def _published(mean: float, std: float = 0.5) -> Published:
    return replace(rows("janus_lora", "imagenet_r", 10)[0], mean=mean, std=std)


@pytest.mark.parametrize(
    ("theirs", "std", "ours", "verdict"),
    (
        (75.0, 0.5, [74.0, 73.5, 73.0], "met"),  # 1.5 points below, on the border
        (75.0, 0.5, [73.4, 73.4, 73.4], "not met"),
        (75.0, 2.5, [73.0, 73.0, 73.0], "met"),  # within the printed spread
        (75.0, float("nan"), [76.4, 76.4, 76.4], "met"),
        (75.0, 0.5, [75.0, 75.0], "n too small"),  # no verdict on fewer than three
        (75.0, 0.5, [], "not run"),
    ),
)
def test_a_level_is_met_within_tolerance_or_spread(
    theirs: float, std: float, ours: list[float], verdict: str
) -> None:
    assert Level(_published(theirs, std), statistic(ours)).verdict == verdict


@pytest.mark.parametrize(
    ("ours", "verdict"),
    (
        # The published difference is 2; t(0.975, 2) is 4.303.
        ([1.9, 2.0, 2.1], "met"),
        ([0.5, 2.0, 3.5], "undecided: the interval contains theirs and zero"),
        ([-0.1, 0.0, 0.1], "not met: the interval contains zero but not theirs"),
        ([4.9, 5.0, 5.1], "same sign, another size"),
        ([-2.1, -2.0, -1.9], "not met: the other sign"),
        ([2.0], "n too small"),
        ([], "not run"),
    ),
)
def test_a_contrast_is_met_if_the_interval_contains_theirs_and_not_zero(
    ours: list[float], verdict: str
) -> None:
    pair = Contrast("a", "b", "acc/sample", statistic(ours))
    assert Claim(_published(76.0), _published(74.0), pair).verdict == verdict


def test_a_contrast_without_the_other_strategy_is_not_run() -> None:
    assert Claim(_published(76.0), _published(74.0), None).verdict == "not run"


def test_what_is_reconstructed_is_never_called_reproduced() -> None:
    perfect = [Level(_published(75.0), statistic([75.0] * 5))]
    assert "reproduced" not in standing("janus_lora", ["the loss"], perfect)
    assert "Agreement of numbers confirms none of these" in standing("janus_lora", ["the loss"], perfect)


def test_reproduced_needs_every_level_on_as_many_runs() -> None:
    met = Level(_published(75.0), statistic([75.0] * 5))
    assert standing("inflora", [], [met]).endswith("every level is met: reproduced.")
    for other in (
        Level(_published(75.0), statistic([75.0] * 4)),
        Level(_published(75.0), statistic([60.0] * 5)),
        Level(_published(75.0), NO_VALUES),
    ):
        assert "reproduced" not in standing("inflora", [], [met, other])


def test_another_protocol_is_never_called_reproduced() -> None:
    met = Level(_published(75.0), statistic([75.0] * 5))
    words = standing("inflora", [], [met], ["the paper used vit; ours seeded random weights"])
    assert ": reproduced" not in words
    assert words.endswith(
        "every level is met. Levels are compared under another protocol (the paper used vit; ours seeded "
        "random weights): not a reproduction."
    )
    assert "not a reproduction" in standing("janus_lora", ["the loss"], [met], ["other weights"])


def test_without_a_number_of_its_own_nothing_is_reproduced() -> None:
    assert standing("inflora", [], []).endswith("no number of its own paper or code is known here.")
    assert "No number of its own paper" in standing("keeplora", ["the head"], [])


@pytest.mark.parametrize(("runs", "tolerance"), ((4, 2.0), (9, 3.0), (None, 1.5)))
def test_a_standard_error_is_converted_to_a_deviation(runs: int | None, tolerance: float) -> None:
    printed = _published(75.0, 1.0)
    printed = replace(printed, source=replace(printed.source, spread="standard error", runs=runs))
    assert Level(printed, NO_VALUES).tolerance == tolerance
