import math

import pytest
import torch

from cl_bench.maths.schedules import QuarterCosine


def rates(epochs: int, stepped: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    schedule = QuarterCosine(optimizer, epochs)
    found = []
    for _ in range(stepped):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_rate_follows_the_formula_of_the_released_code() -> None:
    expected = [0.5 * math.cos(99 * math.pi * epoch / (200 * 19)) for epoch in range(20)]
    assert rates(20, 20) == pytest.approx(expected)
    assert rates(20, 20)[-1] == pytest.approx(0.5 * math.cos(0.495 * math.pi))


def test_a_single_epoch_has_the_full_rate_and_epochs_past_the_end_the_last() -> None:
    assert rates(1, 1) == [0.5]
    assert rates(3, 5)[2:] == pytest.approx([0.5 * math.cos(0.495 * math.pi)] * 3)


def test_a_training_of_another_length_is_refused() -> None:
    schedule = QuarterCosine(torch.optim.SGD([torch.zeros(1)], lr=0.5), epochs=20)
    schedule.require_length(20)
    with pytest.raises(ValueError, match=r"set --model\.scheduler\.epochs 5 as well"):
        schedule.require_length(5)


def test_a_schedule_over_zero_epochs_is_refused() -> None:
    with pytest.raises(ValueError, match="give at least one"):
        rates(0, 1)
