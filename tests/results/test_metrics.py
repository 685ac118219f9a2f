from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from avalanche.evaluation import functional as avalanche_functional
from avalanche.evaluation.metrics import BWT, Forgetting, Mean
from hypothesis import given, settings
from hypothesis import strategies as draw

from cl_bench.results import metrics
from cl_bench.results.metrics import DEFINITIONS, HIGHER_IS_BETTER, Matrix, Vector

NAN = math.nan

# Zero-shot accuracies above the diagonal make six codebases disagree on the forgetting.
WITH_ZERO_SHOT = np.array(
    [[90.0, 40.0, 72.0, 30.0], [80.0, 60.0, 70.0, 38.0], [75.0, 66.0, 68.0, 42.0], [70.0, 71.0, 60.0, 75.0]]
)

# A class-incremental stream of 10, 20 and 50 test images.
TOTAL = np.array([10.0, 20.0, 50.0])
CORRECT = np.array([[8.0, NAN, NAN], [9.0, 14.0, NAN], [6.0, 15.0, 45.0]])
WITHIN = np.array([[8.0, NAN, NAN], [10.0, 16.0, NAN], [9.0, 18.0, 48.0]])
EXPERIENCE = np.array([[10.0, NAN, NAN], [9.0, 15.0, NAN], [7.0, 16.0, 49.0]])

INDIFFERENT_TO_ZERO_SHOT = [
    key for key in DEFINITIONS if key not in ("forgetting/mammoth", "forgetting/renate")
]

repeatable = settings(derandomize=True, deadline=None, max_examples=60)


def learned_only(table: Matrix) -> Matrix:
    """Return ``table`` as a class-incremental stream fills it: NaN above the diagonal."""
    return np.where(np.tri(len(table), dtype=bool), table, NAN)


@draw.composite
def counts(drawn: draw.DrawFn, shortest: int = 2) -> tuple[Matrix, Vector]:
    """Counts (T, T), zero-shot ones included, of T experiences with different numbers of test images."""
    total = np.array(
        drawn(draw.lists(draw.integers(1, 300), min_size=shortest, max_size=7)), dtype=np.float64
    )
    rows = draw.tuples(*(draw.integers(0, int(images)) for images in total))
    table = drawn(draw.lists(rows, min_size=len(total), max_size=len(total)))
    return np.array(table, dtype=np.float64), total


def summary(correct: Matrix, total: Vector) -> dict[str, float]:
    """Every metric of a stream whose experience is always found, which affects only within and task_id."""
    return metrics.summary(correct, total, within=correct, experience=np.where(np.isnan(correct), NAN, total))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("forgetting/mammoth", 30 / 3),
        ("forgetting/pilot", 28 / 3),
        ("forgetting/renate", 27 / 3),
        ("forgetting/chaudhry", 23 / 3),
        ("forgetting/avalanche", 17 / 3),
        ("forgetting/libcontinual", 9 / 3),
        ("bwt/gem", -17 / 3),
        ("bwt/continuum", -36 / 6),
        ("bwt/libcontinual", -24 / 6),
        ("plasticity/experience", 293 / 4),
        ("acc/experience", 276 / 4),
    ],
)
def test_one_matrix_has_six_forgettings_and_three_backward_transfers(key: str, value: float) -> None:
    assert summary(WITH_ZERO_SHOT, np.full(4, 100.0))[key] == pytest.approx(value)


def test_summary_of_a_stream_worked_out_by_hand() -> None:
    values = metrics.summary(CORRECT, TOTAL, within=WITHIN, experience=EXPERIENCE)
    by_hand = {
        "acc/sample": 100 * 66 / 80,
        "acc/experience": (60 + 75 + 90) / 3,
        "maa/sample": (100 * 8 / 10 + 100 * 23 / 30 + 100 * 66 / 80) / 3,
        "maa/experience": (80 + (90 + 70) / 2 + (60 + 75 + 90) / 3) / 3,
        "bwt/gem": (-20 + 5) / 2,
        "bwt/continuum": (10 - 20 + 5) / 3,
        "bwt/libcontinual": -20 / 3,
        "forgetting/chaudhry": (30 - 5) / 2,
        "forgetting/pilot": (30 + 0) / 2,
        "forgetting/mammoth": (30 + 0) / 2,
        "forgetting/renate": (30 - 5) / 2,
        "forgetting/avalanche": (20 - 5) / 2,
        "forgetting/libcontinual": 20 / 2,
        "plasticity/experience": (80 + 70 + 90) / 3,
        "within/sample": 100 * 75 / 80,
        "task_id/sample": 100 * 72 / 80,
    }
    assert values == pytest.approx(by_hand)


def test_every_metric_has_a_definition_and_a_direction() -> None:
    assert list(summary(CORRECT, TOTAL)) == list(DEFINITIONS) == list(HIGHER_IS_BETTER)


def test_a_stream_that_forgets_is_worse_in_every_direction() -> None:
    total = np.full(3, 100.0)
    kept = learned_only(np.full((3, 3), 90.0))
    forgets = learned_only(np.array([[80.0, 0.0, 0.0], [70.0, 80.0, 0.0], [60.0, 70.0, 80.0]]))
    better = metrics.summary(kept, total, within=kept, experience=kept)
    worse = metrics.summary(forgets, total, within=forgets, experience=forgets)
    for key, higher_is_better in HIGHER_IS_BETTER.items():
        assert (better[key] > worse[key]) == higher_is_better, key
        assert better[key] != worse[key], key


@repeatable
@given(counts())
def test_forgetting_since_learning_is_that_of_avalanche(drawn: tuple[Matrix, Vector]) -> None:
    R = metrics.accuracy_matrix(*drawn)
    expected = avalanche_functional.forgetting(R)[-1, :-1].mean()
    assert metrics.forgetting_avalanche(R) == pytest.approx(expected)


@repeatable
@given(counts())
def test_backward_transfer_is_that_of_avalanche(drawn: tuple[Matrix, Vector]) -> None:
    R = metrics.accuracy_matrix(*drawn)
    transfer, forgetting = BWT(), Forgetting()
    for j in range(len(R) - 1):
        for metric in (transfer, forgetting):
            metric.update(j, R[j, j], initial=True)
            metric.update(j, R[-1, j])
    assert metrics.backward_transfer_gem(R) == pytest.approx(np.mean(list(transfer.result().values())))
    assert metrics.forgetting_avalanche(R) == pytest.approx(np.mean(list(forgetting.result().values())))


@repeatable
@given(counts(shortest=1))
def test_accuracy_is_the_mean_of_avalanche_weighted_by_images_or_by_experiences(
    drawn: tuple[Matrix, Vector],
) -> None:
    correct, total = drawn
    R = metrics.accuracy_matrix(correct, total)
    by_sample, by_experience = Mean(), Mean()
    for accuracy, images in zip(R[-1], total, strict=True):
        by_sample.update(accuracy, images)
        by_experience.update(accuracy)
    values = summary(correct, total)
    assert values["acc/sample"] == pytest.approx(by_sample.result())
    assert values["acc/experience"] == pytest.approx(by_experience.result())


@repeatable
@given(counts())
def test_best_accuracy_is_never_below_the_learned_one(drawn: tuple[Matrix, Vector]) -> None:
    values = summary(*drawn)
    rounding = 1e-9
    assert values["forgetting/chaudhry"] >= -values["bwt/gem"] - rounding
    assert values["forgetting/pilot"] >= max(0.0, values["forgetting/chaudhry"]) - rounding
    assert values["forgetting/mammoth"] >= values["forgetting/pilot"] - rounding
    assert values["forgetting/renate"] >= values["forgetting/chaudhry"] - rounding


@repeatable
@given(counts())
def test_without_zero_shot_accuracies_two_pairs_of_forgettings_coincide(drawn: tuple[Matrix, Vector]) -> None:
    correct, total = drawn
    values = summary(learned_only(correct), total)
    assert values["forgetting/mammoth"] == values["forgetting/pilot"]
    assert values["forgetting/renate"] == values["forgetting/chaudhry"]


@repeatable
@given(counts(shortest=3))
def test_zero_shot_accuracies_change_only_the_definitions_that_name_them(
    drawn: tuple[Matrix, Vector],
) -> None:
    correct, total = drawn
    with_zero_shot, without = summary(correct, total), summary(learned_only(correct), total)
    for key in INDIFFERENT_TO_ZERO_SHOT:
        assert with_zero_shot[key] == without[key], key


def test_only_renate_uses_a_zero_shot_accuracy_two_rows_early() -> None:
    raised = WITH_ZERO_SHOT.copy()
    raised[0, 2] = 99.0
    assert metrics.forgetting_mammoth(raised) == metrics.forgetting_mammoth(WITH_ZERO_SHOT)
    assert metrics.forgetting_renate(raised) == pytest.approx(
        metrics.forgetting_renate(WITH_ZERO_SHOT) + 27 / 3
    )


def test_equal_numbers_of_test_images_make_both_weightings_agree() -> None:
    correct = learned_only(WITH_ZERO_SHOT)
    total = np.full(4, 150.0)
    curve = metrics.incremental_accuracy(correct, total)
    R = metrics.accuracy_matrix(correct, total)
    np.testing.assert_allclose(curve, metrics.incremental_experience_accuracy(R))


def test_a_stream_of_one_experience_has_accuracies_and_nothing_to_forget() -> None:
    one = np.array([[3.0]])
    values = metrics.summary(one, np.array([4.0]), within=one, experience=np.array([[4.0]]))
    defined = {key: value for key, value in values.items() if not math.isnan(value)}
    assert defined == {
        "acc/sample": 75.0,
        "acc/experience": 75.0,
        "maa/sample": 75.0,
        "maa/experience": 75.0,
        "plasticity/experience": 75.0,
        "within/sample": 75.0,
        "task_id/sample": 100.0,
    }


def test_two_experiences_leave_libcontinual_nothing_to_compare() -> None:
    values = summary(learned_only(np.array([[8.0, 0.0], [5.0, 9.0]])), np.array([10.0, 10.0]))
    undefined = {key for key, value in values.items() if math.isnan(value)}
    assert undefined == {"bwt/libcontinual", "forgetting/libcontinual"}


def test_a_joint_run_has_final_accuracies_only() -> None:
    def last_row(table: Matrix) -> Matrix:
        return np.where(np.arange(3)[:, None] == 2, table, NAN)

    values = metrics.summary(
        last_row(CORRECT), TOTAL, within=last_row(WITHIN), experience=last_row(EXPERIENCE)
    )
    whole = metrics.summary(CORRECT, TOTAL, within=WITHIN, experience=EXPERIENCE)
    defined = {key: value for key, value in values.items() if not math.isnan(value)}
    final = ("acc/sample", "acc/experience", "within/sample", "task_id/sample")
    assert defined == {key: whole[key] for key in final}


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_a_run_in_progress_has_a_curve_so_far_and_no_metric(rows: int) -> None:
    so_far = np.where(np.arange(3)[:, None] < rows, CORRECT, NAN)
    assert all(math.isnan(value) for value in summary(so_far, TOTAL).values())
    curve = metrics.incremental_accuracy(so_far, TOTAL)
    np.testing.assert_array_equal(curve[:rows], metrics.incremental_accuracy(CORRECT, TOTAL)[:rows])
    assert np.isnan(curve[rows:]).all()


def test_a_missing_evaluation_undefines_exactly_what_needs_it() -> None:
    R = learned_only(WITH_ZERO_SHOT)
    R[1, 0] = NAN
    undefined = {key for key, value in summary(R, np.full(4, 100.0)).items() if math.isnan(value)}
    assert undefined == {
        "maa/sample",
        "maa/experience",
        "bwt/continuum",
        "forgetting/chaudhry",
        "forgetting/pilot",
        "forgetting/mammoth",
        "forgetting/renate",
    }


def test_transfer_average_and_last_of_a_multi_domain_stream() -> None:
    assert metrics.mtil_transfer(WITH_ZERO_SHOT) == pytest.approx((40 + 142 / 2 + 110 / 3) / 3)
    assert metrics.mtil_average(WITH_ZERO_SHOT) == pytest.approx(1007 / 16)
    assert metrics.mtil_last(WITH_ZERO_SHOT) == pytest.approx(276 / 4)


def test_a_class_incremental_stream_has_no_zero_shot_transfer() -> None:
    R = metrics.accuracy_matrix(CORRECT, TOTAL)
    assert math.isnan(metrics.mtil_transfer(R))
    assert math.isnan(metrics.mtil_average(R))
    assert math.isnan(metrics.mtil_transfer(R[:1, :1]))


@pytest.mark.parametrize(
    ("correct", "total", "message"),
    [
        (CORRECT[:2], TOTAL, "not an accuracy matrix"),
        (np.empty((0, 0)), np.empty(0), "not an accuracy matrix"),
        (CORRECT, TOTAL[:2], "do not match 3 experiences"),
        (CORRECT, np.array([10.0, 0.0, 50.0]), "Experience 1 has no test images"),
        (100 * CORRECT / TOTAL, TOTAL, r"80 of 10 test images cannot be right \(row 0, experience 0\)"),
        (-CORRECT, TOTAL, "-8 of 10 test images"),
    ],
)
def test_impossible_counts_are_an_error(correct: Matrix, total: Vector, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.accuracy_matrix(correct, total)
    with pytest.raises(ValueError, match=message):
        metrics.incremental_accuracy(correct, total)


@pytest.mark.parametrize(
    "function",
    [
        metrics.backward_transfer_gem,
        metrics.backward_transfer_continuum,
        metrics.backward_transfer_libcontinual,
        metrics.forgetting_chaudhry,
        metrics.forgetting_pilot,
        metrics.forgetting_mammoth,
        metrics.forgetting_renate,
        metrics.forgetting_avalanche,
        metrics.forgetting_libcontinual,
        metrics.plasticity,
        metrics.incremental_experience_accuracy,
        metrics.mtil_transfer,
        metrics.mtil_average,
        metrics.mtil_last,
    ],
)
def test_an_array_that_is_not_square_is_an_error(function: Callable[[Matrix], object]) -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 4\) is not an accuracy matrix"):
        function(WITH_ZERO_SHOT[:2])
