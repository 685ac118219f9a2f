"""What counts as learnt."""

import pytest
from scipy.stats import binom

from cl_bench.check.learning import Learnt


@pytest.mark.parametrize("classes", (2, 5, 12, 40))
def test_what_is_needed_is_beyond_guesses_by_the_binomial_distribution(classes: int) -> None:
    needed = Learnt(classes, 1.0, None, None, epochs=1).needed
    number = round(needed * classes)
    assert binom.sf(number - 1, classes, 1 / classes) < 1e-4
    assert binom.sf(number - 2, classes, 1 / classes) >= 1e-4


def test_a_loss_that_rises_is_a_fault_whatever_the_accuracy() -> None:
    assert Learnt(12, 1.0, 2.0, 1.0, epochs=1).fault is None
    assert "the loss does not fall" in str(Learnt(12, 1.0, 1.0, 2.0, epochs=1).fault)
    assert "the loss does not fall" in str(Learnt(12, 1.0, 1.0, float("nan"), epochs=1).fault)
