from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from cl_bench.maths.rectification import Gauge, _inverse, rectified
from cl_bench.maths.subspace import right_residual
from cl_bench.maths.violation import relative_violation

GAUGES: tuple[Gauge, ...] = get_args(Gauge)
M, N, R, K = 24, 20, 4, 6
SCALE = 0.5
EXACT = 1e-14  # a damping too small to be seen


def composite(A: Tensor, B: Tensor, X: Tensor, Y: Tensor) -> Tensor:
    """What updates X of A and Y of B do to the weight, to first order."""
    return SCALE * (B @ X + Y @ A)


class Draw:
    """Factors, a gradient of the weight, and protected directions, all in float64."""

    def __init__(self, seed: int = 0, *layers: int, safe_rows: bool = False, protected: int = K) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*layers, *shape, generator=generator, dtype=torch.float64)

        self.V = torch.linalg.qr(normal(N, protected)).Q
        self.A, self.B, self.G = normal(R, N), normal(M, R), normal(M, N)
        if safe_rows:
            self.A = right_residual(self.A, self.V)
        self.safe = right_residual(self.G, self.V)

    def updates(self, gauge: Gauge = "half", damping: float = EXACT) -> tuple[Tensor, Tensor]:
        gradients = SCALE * self.B.mT @ self.safe, SCALE * self.safe @ self.A.mT
        return rectified(self.A, self.B, *gradients, scale=SCALE, damping=damping, gauge=gauge)

    def composite(self, gauge: Gauge = "half", damping: float = EXACT) -> Tensor:
        return composite(self.A, self.B, *self.updates(gauge, damping))

    @property
    def projectors(self) -> tuple[Tensor, Tensor]:
        """Projectors on the columns of B (m, m) and the rows of A (n, n), by pseudo-inverses."""
        return self.B @ torch.linalg.pinv(self.B), torch.linalg.pinv(self.A) @ self.A


@cache
def least_squares(seed: int) -> tuple[Tensor, Tensor]:
    """Return the shortest pair (X, Y) whose composite is nearest to the safe gradient, by LAPACK's gelsd."""
    draw = Draw(seed)
    by_A = np.kron(draw.B.numpy(), np.eye(N))  # of the rows of X, one after the other
    by_B = np.kron(np.eye(M), draw.A.numpy().T)
    found = np.linalg.lstsq(SCALE * np.hstack([by_A, by_B]), draw.safe.numpy().ravel(), rcond=1e-12)[0]
    X, Y = torch.from_numpy(found).split([R * N, M * R])
    return X.reshape(R, N), Y.reshape(M, R)


def equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("gauge", GAUGES)
def test_the_composite_is_the_least_squares_optimum(gauge: Gauge) -> None:
    draw = Draw()
    best = composite(draw.A, draw.B, *least_squares(0))
    equal(draw.composite(gauge), best)
    in_columns, in_rows = draw.projectors
    tangent = in_columns @ draw.safe + (draw.safe - in_columns @ draw.safe) @ in_rows
    equal(draw.composite(gauge), tangent)


def test_the_minimal_norm_gauge_is_the_shortest_solution() -> None:
    draw = Draw()
    for found, expected in zip(draw.updates("minnorm"), least_squares(0), strict=True):
        equal(found, expected)
    lengths = [sum(float(update.square().sum()) for update in draw.updates(gauge)) for gauge in GAUGES]
    assert min(lengths) == lengths[GAUGES.index("minnorm")] < 0.999 * sorted(lengths)[1]


def test_the_minimal_norm_gauge_is_also_nearest_to_the_gradients_of_the_factors() -> None:
    draw = Draw()
    X, Y = draw.updates("minnorm")
    off_A, off_B = X - SCALE * draw.B.mT @ draw.safe, Y - SCALE * draw.safe @ draw.A.mT
    # At the nearest pair no exchange (Z A, -B Z) between the factors points downhill.
    equal(off_A @ draw.A.mT, draw.B.mT @ off_B)


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("damping", [EXACT, 1e-2])
def test_gauges_change_the_updates_and_never_the_composite(gauge: Gauge, damping: float) -> None:
    draw = Draw(1)
    reference = draw.composite("a-first", damping)
    equal(draw.composite(gauge, damping), reference)
    others = [draw.updates(other, damping)[0] for other in GAUGES if other != gauge]
    assert all((draw.updates(gauge, damping)[0] - other).abs().max() > 1e-2 for other in others)


def test_updates_equal_their_form_in_pseudo_inverses_of_the_whole_gradient() -> None:
    draw = Draw(2)
    down, up = torch.linalg.pinv(draw.A), torch.linalg.pinv(draw.B)
    in_columns, in_rows = draw.projectors
    rows, columns = torch.eye(N) - in_rows, torch.eye(M) - in_columns
    expected: dict[Gauge, tuple[Tensor, Tensor]] = {
        "a-first": (up @ draw.safe, columns @ draw.safe @ down),
        "b-first": (up @ draw.safe @ rows, draw.safe @ down),
        "half": (
            up @ draw.safe @ (torch.eye(N) - in_rows / 2),
            (torch.eye(M) - in_columns / 2) @ draw.safe @ down,
        ),
    }
    for gauge, pair in expected.items():
        for found, form in zip(draw.updates(gauge), pair, strict=True):
            equal(found, form / SCALE)


def test_the_composite_depends_on_the_product_of_the_factors_only() -> None:
    draw = Draw(3)
    before = draw.composite()
    mixing = torch.randn(R, R, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draw.A, draw.B = mixing @ draw.A, draw.B @ torch.linalg.inv(mixing)
    equal(draw.composite(), before)


def test_damping_is_that_of_a_ridge_regression_in_units_of_the_mean_energy() -> None:
    draw, damping = Draw(4), 0.3
    identity = torch.eye(R, dtype=torch.float64)
    stacked = torch.cat([draw.B, damping**0.5 * draw.B.square().sum(0).mean().sqrt() * identity])
    targets = torch.cat([draw.safe, torch.zeros(R, N)])
    ridge = np.linalg.lstsq(stacked.numpy(), targets.numpy(), rcond=None)[0]
    equal(draw.updates("a-first", damping)[0], torch.from_numpy(ridge) / SCALE)
    stacked = torch.cat([draw.A.T, damping**0.5 * draw.A.square().sum(1).mean().sqrt() * identity])
    targets = torch.cat([draw.safe.T, torch.zeros(R, M)])
    ridge = np.linalg.lstsq(stacked.numpy(), targets.numpy(), rcond=None)[0]
    equal(draw.updates("b-first", damping)[1].T, torch.from_numpy(ridge) / SCALE)


@pytest.mark.parametrize("length", [1e-6, 0.01, 100.0])
def test_columns_of_b_of_any_length_come_as_near_to_the_closed_form(length: float) -> None:
    """In its first steps Adam makes columns of about 0.01, where a fixed damping of 1e-4 is 35 % off."""
    draw = Draw(18)
    draw.B *= length / draw.B.norm(dim=0)
    best = draw.composite()
    in_columns, in_rows = draw.projectors
    equal(best, in_columns @ draw.safe + (draw.safe - in_columns @ draw.safe) @ in_rows)
    damped = draw.composite(damping=1e-4)
    assert (damped - best).norm() < 1e-3 * best.norm()


def test_what_is_left_in_protected_directions_has_a_closed_form() -> None:
    draw = Draw(5)
    in_columns, in_rows = draw.projectors
    left = (torch.eye(M) - in_columns) @ draw.safe @ in_rows @ draw.V
    equal(draw.composite() @ draw.V, left)
    assert torch.linalg.matrix_norm(left) > 1


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("damping", [EXACT, 1e-2])
def test_rows_without_protected_directions_leave_nothing_in_them(gauge: Gauge, damping: float) -> None:
    draw = Draw(6, safe_rows=True)
    assert relative_violation(draw.composite(gauge, damping), draw.V) < 1e-12
    X, Y = draw.updates(gauge, damping)
    assert relative_violation(X, draw.V) < 1e-12
    second_order = (draw.B - 0.1 * Y) @ (draw.A - 0.1 * X) - draw.B @ draw.A
    assert relative_violation(second_order, draw.V) < 1e-12


def test_projecting_only_one_factor_is_neither_safe_nor_as_near_to_the_gradient() -> None:
    draw = Draw(7, 100)
    X, Y = right_residual(SCALE * draw.B.mT @ draw.G, draw.V), SCALE * draw.G @ draw.A.mT
    naive = composite(draw.A, draw.B, X, Y)
    assert bool((relative_violation(naive, draw.V) > 0.1).all())
    by_one, by_both = (
        torch.cosine_similarity(update.flatten(1), draw.safe.flatten(1))
        for update in (naive, draw.composite())
    )
    assert bool((by_both > by_one).all())
    draw = Draw(7, 100, safe_rows=True)
    assert bool((relative_violation(draw.composite(), draw.V) < 1e-12).all())


def test_the_safe_gradient_of_b_is_that_of_an_up_projection_over_projected_rows() -> None:
    draw = Draw(8)
    x, delta = torch.randn(7, N, dtype=torch.float64), torch.randn(7, M, dtype=torch.float64)
    safe = right_residual(delta.T @ x, draw.V)
    zero = torch.zeros(M, R, dtype=torch.float64, requires_grad=True)
    output = SCALE * (x @ right_residual(draw.A, draw.V).T) @ zero.T
    (found,) = torch.autograd.grad((output * delta).sum(), zero)
    equal(found, SCALE * safe @ draw.A.T, 1e-12)


@pytest.mark.parametrize("protected", [0, K])
def test_the_composite_is_a_direction_of_descent(protected: int) -> None:
    draw = Draw(9, 2000, safe_rows=True, protected=protected)
    step = draw.composite()
    along, squared = (step * draw.G).sum((-2, -1)), step.square().sum((-2, -1))
    torch.testing.assert_close(along, squared, rtol=1e-9, atol=0)
    assert bool((squared > 1).all())
    assert bool(((draw.composite(damping=1.0) * draw.G).sum((-2, -1)) > 0).all())


@pytest.mark.parametrize("gauge", GAUGES)
def test_a_fresh_adapter_moves_only_b_by_the_pseudo_inverse(gauge: Gauge) -> None:
    draw = Draw(10)
    draw.B = torch.zeros_like(draw.B)
    X, Y = draw.updates(gauge)
    assert not X.any()
    equal(Y, draw.safe @ torch.linalg.pinv(draw.A) / SCALE)
    X, Y = draw.updates(gauge, damping=1e-4)
    assert not X.any()
    torch.testing.assert_close(Y, draw.updates(gauge)[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("gauge", GAUGES)
def test_columns_of_b_that_coincide_leave_the_updates_finite(gauge: Gauge) -> None:
    draw = Draw(11)
    draw.B[:, 1] = draw.B[:, 0]
    A, B, safe = draw.A.float(), draw.B.float(), draw.safe.float()
    X, Y = rectified(A, B, SCALE * B.T @ safe, SCALE * safe @ A.T, scale=SCALE, gauge=gauge)
    assert X.isfinite().all() and Y.isfinite().all()
    in_columns, in_rows = draw.projectors  # of rank 3, by singular values
    tangent = in_columns @ draw.safe + (draw.safe - in_columns @ draw.safe) @ in_rows
    torch.testing.assert_close(composite(A, B, X, Y).double(), tangent, rtol=0, atol=1e-3)


def test_with_nothing_protected_it_is_the_tangent_projection_of_the_gradient() -> None:
    draw = Draw(12, protected=0)
    in_columns, in_rows = draw.projectors
    assert torch.equal(draw.safe, draw.G)
    equal(draw.composite(), in_columns @ draw.G + (draw.G - in_columns @ draw.G) @ in_rows)


@pytest.mark.parametrize("gauge", GAUGES)
def test_with_everything_protected_nothing_moves(gauge: Gauge) -> None:
    draw = Draw(13, protected=N)
    X, Y = draw.updates(gauge)
    assert X.abs().max() < 1e-12 and Y.abs().max() < 1e-12


@pytest.mark.parametrize("gauge", GAUGES)
def test_all_layers_at_once_equal_one_after_the_other(gauge: Gauge) -> None:
    draw = Draw(14, 2, 3)
    X, Y = draw.updates(gauge, damping=1e-4)
    for i in np.ndindex(2, 3):
        single = Draw(14)
        single.A, single.B, single.safe = draw.A[i], draw.B[i], draw.safe[i]
        for found, expected in zip((X[i], Y[i]), single.updates(gauge, damping=1e-4), strict=True):
            equal(found, expected, 1e-12)


def test_updates_take_the_type_of_the_gradients_and_the_precision_of_the_factors() -> None:
    draw = Draw(15)
    X, Y = draw.updates("minnorm", damping=1e-4)
    pair = SCALE * draw.B.T @ draw.safe, SCALE * draw.safe @ draw.A.T
    single = [tensor.float() for tensor in (draw.A, draw.B, *pair)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = rectified(*single, scale=SCALE, gauge="minnorm")
    for update, expected in zip(found, (X, Y), strict=True):
        assert update.dtype == torch.float32
        torch.testing.assert_close(update, expected.float(), rtol=1e-5, atol=1e-5)
    half = rectified(*[tensor.bfloat16() for tensor in (draw.A, draw.B, *pair)], scale=SCALE)
    assert all(update.dtype == torch.bfloat16 for update in half)


def test_updates_of_parameters_carry_no_graph() -> None:
    draw = Draw(16)
    draw.A.requires_grad_()
    draw.B.requires_grad_()
    assert not any(update.requires_grad for update in draw.updates())


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_factor_that_is_not_finite_reaches_only_its_own_layer(gauge: Gauge, factor: str) -> None:
    draw = Draw(17, 2)
    getattr(draw, factor)[0, 1, 2] = torch.nan
    step = draw.composite(gauge, damping=1e-4)
    assert step[0].isnan().all()
    assert step[1].isfinite().all()


def test_a_gram_matrix_without_a_factor_gives_nan_and_affects_no_other() -> None:
    # Rounding makes such a matrix of a singular one whose entries are too large for the damping.
    inverses = _inverse(torch.tensor([[[1.0, 2.0], [2.0, 1.0]], [[4.0, 2.0], [2.0, 10.0]]]))
    assert inverses[0].isnan().all()
    torch.testing.assert_close(36 * inverses[1], torch.tensor([[10.0, -2.0], [-2.0, 4.0]]))


@pytest.mark.parametrize("damping", [0.0, -1e-4, float("nan")])
def test_a_damping_that_is_not_positive_is_refused(damping: float) -> None:
    with pytest.raises(ValueError, match=r"give a positive one, such as 1e-4"):
        Draw().updates(damping=damping)


# A regression in float32: targets need every input direction, six of which are protected.
Optimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def train(optimizer: Optimizer, steps: int, *, reproject: bool = False) -> tuple[float, float]:
    """Return the relative violation of the trained product, and which part of the first loss is left."""
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(64, N, generator=generator), torch.randn(M, N, generator=generator)
    V = torch.linalg.qr(torch.randn(N, K, generator=generator)).Q
    A = right_residual(torch.randn(R, N, generator=generator) / N**0.5, V).requires_grad_()
    B = torch.zeros(M, R, requires_grad=True)
    targets, stepping, losses = inputs @ weight.T, optimizer([A, B]), []
    for _ in range(steps):
        stepping.zero_grad()
        loss = (inputs @ A.T @ B.T - targets).square().mean()
        loss.backward()
        assert A.grad is not None and B.grad is not None
        A.grad, B.grad = rectified(A, B, right_residual(A.grad, V), B.grad, scale=1.0)
        stepping.step()
        if reproject:
            with torch.no_grad():
                A.copy_(right_residual(A, V))
        losses.append(loss.item())
    return relative_violation((B @ A).detach(), V).item(), losses[-1] / losses[0]


def test_sgd_with_momentum_keeps_protected_directions_clear() -> None:
    violation, left = train(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3), 1000)
    assert left < 0.8
    assert violation < 1e-4


def test_adam_keeps_protected_directions_clear_only_with_projected_rows() -> None:
    violation, left = train(lambda p: torch.optim.Adam(p, lr=0.01), 300)
    assert left < 0.8
    assert violation > 1e-2
    violation, left = train(lambda p: torch.optim.AdamW(p, lr=0.01), 300, reproject=True)
    assert left < 0.8
    assert violation < 1e-5
