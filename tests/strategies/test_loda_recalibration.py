from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cl_bench.maths.recalibration import Recalibration, recalibration

EYE = torch.eye(4, dtype=torch.float64)
GAMMA = 3.0


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(seed: int) -> Tensor:
    inputs = normal(50, 32, seed=seed)
    return inputs.mT @ inputs / 50


OLD, NEW = moments(0), moments(1)
UP, DOWN = normal(96, 4, seed=2), normal(4, 32, seed=3)


def objective(scaling: Tensor) -> float:
    """Return what old inputs see of the product plus what new ones miss of it, weighted."""

    def energy(product: Tensor, second_moment: Tensor) -> float:
        return float((product @ second_moment @ product.mT).trace())

    return energy(UP @ scaling @ DOWN, OLD) + GAMMA * energy(UP @ (scaling - EYE) @ DOWN, NEW)


def test_the_full_form_is_the_optimum_whatever_b() -> None:
    scaling = recalibration(DOWN, OLD, NEW, GAMMA, "full").requires_grad_()

    def energy(product: Tensor, second_moment: Tensor) -> Tensor:
        return (product @ second_moment @ product.mT).trace()

    loss = energy(UP @ scaling @ DOWN, OLD) + GAMMA * energy(UP @ (scaling - EYE) @ DOWN, NEW)
    (gradient,) = torch.autograd.grad(loss, scaling)
    assert gradient.abs().max() < 1e-9 * loss.item()


def test_the_diagonal_form_lies_between_the_optimum_and_none() -> None:
    values = [objective(recalibration(DOWN, OLD, NEW, GAMMA, kind)) for kind in ("full", "diag", "none")]
    assert values == sorted(values)
    entries = recalibration(DOWN, OLD, NEW, GAMMA, "diag").diagonal()
    assert bool(((entries >= 0) & (entries <= 1)).all())


@pytest.mark.parametrize("kind", ("diag", "full"))
def test_new_inputs_alone_keep_the_product_and_old_ones_alone_remove_it(kind: Recalibration) -> None:
    torch.testing.assert_close(recalibration(DOWN, OLD, NEW, 1e9, kind), EYE, atol=1e-6, rtol=0)
    torch.testing.assert_close(recalibration(DOWN, OLD, NEW, 1e-9, kind), 0 * EYE, atol=1e-6, rtol=0)
    torch.testing.assert_close(recalibration(DOWN, 0 * OLD, NEW, GAMMA, kind), EYE, atol=1e-9, rtol=0)
