from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from cl_bench.maths.memory import GPM, DualGPM

WIDTH, LAYERS = 16, 3
KINDS = pytest.mark.parametrize("kind", [GPM, DualGPM])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def protecting(count: int, kind: type[GPM] = GPM, dtype: torch.dtype | None = None) -> tuple[GPM, Tensor]:
    """Return a memory of random bases of ``count`` directions, and the projectors (L, d, d) on them."""
    memory = kind(LAYERS, WIDTH, dtype=dtype)
    bases = torch.linalg.qr(normal(LAYERS, WIDTH, count, seed=7)).Q
    for projection, basis in enumerate(bases):
        memory.replace(projection, basis)
    return memory, bases @ bases.mT


def largest(x: Tensor) -> float:
    return float(x.abs().max())


@KINDS
@pytest.mark.parametrize("protected", [0, 4, 11])
def test_they_are_left_singular_vectors_of_the_residual(kind: type[GPM], protected: int) -> None:
    memory, projectors = protecting(protected, kind)
    x = normal(LAYERS, WIDTH, 5) * torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    directions = memory.free_directions(x, rank=3)
    for found, residual in zip(directions.numpy(), (x - projectors @ x).numpy(), strict=True):
        vectors = scipy.linalg.svd(residual)[0][:, :3]
        assert np.abs(np.abs(np.sum(vectors * found, axis=0)) - 1).max() < 1e-10


@KINDS
@pytest.mark.parametrize("protected", [4, 11])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_they_are_orthonormal_and_avoid_what_is_protected(
    kind: type[GPM], protected: int, dtype: torch.dtype, tolerance: float
) -> None:
    memory, _ = protecting(protected, kind, dtype)
    x = normal(LAYERS, 40, WIDTH)
    directions = memory.free_directions((x.mT @ x).to(dtype), rank=2)
    assert directions.dtype == dtype
    assert largest(directions.mT @ directions - torch.eye(2)) < tolerance
    for projection in range(LAYERS):
        assert largest(directions[projection].mT @ memory.basis(projection)) < tolerance


@KINDS
@pytest.mark.parametrize("rows", [1, 3])
def test_without_energy_they_still_avoid_what_is_protected(kind: type[GPM], rows: int) -> None:
    # Fewer inputs than directions, or none outside the span: singular vectors would then be arbitrary.
    memory, projectors = protecting(4, kind)
    x = normal(LAYERS, WIDTH, rows)
    if rows == 1:
        x = projectors @ x
    directions = memory.free_directions(x, rank=5)
    assert largest(directions.mT @ directions - torch.eye(5)) < 1e-14
    assert largest(projectors @ directions) < 1e-13


def test_those_of_a_gradient_leave_the_least_behind() -> None:
    # Eckart and Young: what rank r cannot reach are the singular values after the first r.
    memory, _ = protecting(6)
    gradients = normal(LAYERS, 20, WIDTH)
    directions = memory.free_directions(gradients.mT, rank=4)
    for projection in range(LAYERS):
        safe = memory.right_residual(gradients[projection], projection)
        left = (safe - safe @ directions[projection] @ directions[projection].mT).norm()
        assert abs(left - torch.linalg.svdvals(safe)[4:].norm()) < 1e-12


def almost_full() -> DualGPM:
    """Return a memory whose second basis leaves two dimensions free."""
    memory = DualGPM(2, WIDTH)
    memory.replace(1, torch.eye(WIDTH, 14, dtype=torch.float64))
    return memory


def test_a_rank_beyond_what_is_free_is_refused() -> None:
    memory, x = almost_full(), normal(2, WIDTH, 40)
    assert memory.free_directions(x, rank=2).shape == (2, WIDTH, 2)
    with pytest.raises(ValueError, match="Basis 1 leaves 2 of 16 dimensions free, fewer than the rank 3: lo"):
        memory.free_directions(x, rank=3)


def test_a_rank_beyond_what_is_free_may_leave_zeros_with_a_warning() -> None:
    memory, x = almost_full(), normal(2, WIDTH, 40)
    with pytest.warns(UserWarning, match="Basis 1 leaves 2 of 16 dimensions free, fewer than the rank 3"):
        found = memory.free_directions(x, rank=3, short="zeros")
    norms = found.norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]).to(norms))
    assert memory.residual(found[1], 1).sub(found[1]).abs().max() < 1e-12


@pytest.mark.parametrize("rank", [0, WIDTH + 1])
def test_a_rank_beyond_the_width_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"No {rank} directions of 16 .* choose a rank from 1 to 16"):
        GPM(LAYERS, WIDTH).free_directions(normal(LAYERS, WIDTH, 40), rank)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_weak_free_directions_are_right_beside_strong_protected_ones(
    kind: type[GPM], dtype: torch.dtype, seed: int
) -> None:
    # Squared, the shares of energy that are free are 4e-9 and less, and float32 rounds at 1e-7.
    axes = torch.linalg.qr(normal(8, 8, seed=seed)).Q
    moments = (axes * torch.tensor([1, 1, 1, 1, 1, 3e-4, 2e-4, 1e-4])) @ axes.mT
    memory = kind(1, 8, "covariance", dtype=dtype)
    memory.replace(0, axes[:, :5])
    found = memory.free_directions(moments[None], rank=3)[0]
    torch.testing.assert_close((axes[:, 5:].mT @ found).abs(), torch.eye(3).to(found), atol=1e-3, rtol=0)
    memory.update(moments[None], lambda shares, held: [1])
    left = memory.residual(axes, 0).norm(dim=0)
    torch.testing.assert_close(left, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]).to(left), atol=1e-3, rtol=0)
