from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cl_bench.contracts.strategy import TrainingData
from cl_bench.data.experience import Experience
from cl_bench.network.backbones import Backbone
from strategies.codyra import CoDyRA, proximal

Walking = Callable[..., Any]
Making = Callable[..., Backbone]

NUMBERS = st.floats(-4, 4, width=32)


def codyra(backbone: Making, kind: type[CoDyRA] = CoDyRA, **settings: Any) -> CoDyRA:
    how: dict[str, Any] = {
        "rank": 4,
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    }
    return kind(backbone(), **how | settings)


@given(weight=NUMBERS, kappa=st.floats(0.01, 2))
def test_the_proximal_operator_minimises_what_it_is_defined_by(weight: float, kappa: float) -> None:
    def cost(found: float) -> float:
        return (found - weight) ** 2 / 2 + kappa * abs(found)

    best = scipy.optimize.minimize_scalar(cost, bounds=(-5, 5), method="bounded", options={"xatol": 1e-9}).x
    found = proximal(torch.tensor([weight], dtype=torch.float64), kappa).item()
    assert cost(found) <= cost(best) + 1e-12
    assert found == pytest.approx(best, abs=1e-4)


@given(weight=NUMBERS, kappa=st.floats(0.01, 2))
def test_the_released_operator_differs_only_between_one_and_two_thresholds(
    weight: float, kappa: float
) -> None:
    weights = torch.tensor([weight], dtype=torch.float64)
    ours, its = proximal(weights, kappa).item(), proximal(weights, kappa, "code").item()
    if kappa < abs(weight) < 2 * kappa * (1 - 1e-9):
        assert its == 0 != ours
    elif not 2 * kappa * (1 - 1e-9) <= abs(weight) <= 2 * kappa * (1 + 1e-9):
        assert its == ours


def test_the_threshold_rises_in_fifty_levels_over_the_second_half(backbone: Making) -> None:
    strategy = codyra(backbone, kappa_max=0.49)
    found = [strategy.kappa(step, 500) for step in range(1, 501)]
    assert not any(found[:250])
    expected = [0.01 * level for level in range(50) for _ in range(5)]
    assert found[250:] == pytest.approx(expected)


def test_an_adapter_is_a_sum_over_its_ranks(backbone: Making) -> None:
    strategy = codyra(backbone)
    strategy.expand(Experience(0, 2, range(2)))
    layer = strategy.layers[0]
    expected = layer.weight.double()
    with torch.no_grad():
        for name, rows in layer.rows.items():
            adapter = layer.adapter(name)
            adapter.B.normal_()
            for rank, weight in enumerate(layer.importance[name].double()):
                expected[rows] += weight * torch.outer(adapter.B[:, rank], adapter.A[rank]).double()
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert layer.bias is not None
    torch.testing.assert_close(layer(x).double(), x.double() @ expected.T + layer.bias, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.effective_weight().double(), expected, atol=1e-5, rtol=1e-5)


def test_at_the_first_step_only_the_up_projection_has_a_gradient(backbone: Making) -> None:
    strategy = codyra(backbone)
    strategy.expand(Experience(0, 2, range(2)))
    strategy.features(torch.rand(2, 3, 16, 16)).square().sum().backward()
    for _, adapter in strategy.adapters():
        assert adapter.A.grad is not None and not adapter.A.grad.any()
        assert adapter.B.grad is not None and adapter.B.grad.any()
    for layer in strategy.layers:
        assert not any(
            weights.grad.any() for weights in layer.importance.values() if weights.grad is not None
        )


def active_ranks(strategy: CoDyRA) -> list[int]:
    """Number of ranks with a weight other than zero, of each adapter."""
    every = (weights for layer in strategy.layers for weights in layer.importance.values())
    return [int(weights.count_nonzero()) for weights in every]


@pytest.mark.parametrize("kappa_max", (0.0, 1.0))
def test_ranks_are_pruned_by_the_threshold_and_by_nothing_else(
    backbone: Making, walk: Walking, kappa_max: float
) -> None:
    active: list[list[int]] = []
    thresholds: list[float] = []

    class Spied(CoDyRA):
        def after_step(self) -> None:
            super().after_step()
            whole = int(self.trainer.num_training_batches) * (self.trainer.max_epochs or 0)
            thresholds.append(self.kappa(int(self.steps), whole))

        def after_training(self, data: TrainingData) -> None:
            active.append(active_ranks(self))
            super().after_training(data)

    walk(codyra(backbone, Spied, kappa_max=kappa_max), max_epochs=2)
    assert len(active) == 3
    assert thresholds.count(0) >= len(thresholds) // 2
    assert max(thresholds) > 0 or kappa_max == 0
    assert all(count == 4 for counts in active for count in counts) == (kappa_max == 0)


def test_merging_leaves_out_the_ranks_without_weight(backbone: Making) -> None:
    strategy = codyra(backbone)
    strategy.expand(Experience(0, 2, range(2)))
    layer = strategy.layers[0]
    before = layer.weight.clone()
    found: list[Tensor] = []
    with torch.no_grad():
        for name in layer.rows:
            adapter, weights = layer.adapter(name), layer.importance[name]
            adapter.B.normal_()
            weights[:2] = 0
            found.append((adapter.B[:, 2:] * weights[2:]) @ adapter.A[2:])
    layer.merge()
    for rows, change in zip(layer.rows.values(), found, strict=True):
        torch.testing.assert_close(layer.weight[rows] - before[rows], change, atol=1e-5, rtol=1e-4)


def test_every_experience_starts_with_all_ranks_and_counts_its_own_steps(
    backbone: Making, walk: Walking
) -> None:
    counted: list[tuple[int, int]] = []

    class Spied(CoDyRA):
        def after_training(self, data: TrainingData) -> None:
            counted.append((int(self.steps), int(self.trainer.num_training_batches) * 2))
            super().after_training(data)

    strategy = codyra(backbone, Spied, kappa_max=1.0)
    walk(strategy, max_epochs=2)
    assert all(steps == whole > 0 for steps, whole in counted)
    strategy.expand(Experience(3, 4, range(6, 8)))
    assert set(active_ranks(strategy)) == {4}
