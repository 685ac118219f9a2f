from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from cl_bench.maths.subspace import (
    Energy,
    complement,
    directions_needed,
    energy_threshold,
    generalised_directions,
    leading_directions,
    of_unit_energy,
    principal_subspace,
    residual,
    right_residual,
    spectrum,
)

WIDTH, LAYERS = 16, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(*shape: int) -> Tensor:
    basis: Tensor = torch.linalg.qr(normal(*shape)).Q
    return basis


def inputs(seed: int) -> Tensor:
    """Inputs (L, N, d) of one experience, with axes of its own and a spectrum that decays."""
    mixing = normal(LAYERS, WIDTH, WIDTH, seed=100 + seed) / torch.arange(1.0, WIDTH + 1)[:, None] ** 2
    return normal(LAYERS, 40, WIDTH, seed=seed) @ mixing


def second_moments(x: Tensor) -> Tensor:
    return x.mT @ x / x.shape[-2]


def moments(seed: int) -> Tensor:
    return second_moments(inputs(seed))


def projector(basis: Tensor) -> Tensor:
    return basis @ basis.mT


def largest(x: Tensor) -> float:
    return float(x.abs().max())


# Projections and bases


def test_both_residuals_are_products_with_the_projector_on_the_complement() -> None:
    basis, x = orthonormal(2, 6, 3), normal(2, 6, 6, seed=1)
    outside = torch.eye(6, dtype=torch.float64) - projector(basis)
    assert largest(residual(x, basis) - outside @ x) < 1e-14
    assert largest(right_residual(x, basis) - x @ outside) < 1e-14


def test_a_right_residual_maps_the_span_to_zero() -> None:
    basis = orthonormal(6, 3)
    assert largest(right_residual(normal(4, 6, seed=1), basis) @ basis) < 1e-14


def test_without_directions_everything_is_residual() -> None:
    x, nothing = normal(6, 6), torch.zeros(6, 0, dtype=torch.float64)
    assert torch.equal(residual(x, nothing), x)
    assert torch.equal(right_residual(x, nothing), x)


def test_mixed_precision_does_not_reach_the_projections() -> None:
    basis = orthonormal(WIDTH, 5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows, columns = right_residual(torch.ones(2, WIDTH), basis), residual(torch.ones(WIDTH, 2), basis)
    assert largest(rows @ basis) < 1e-6
    assert largest(basis.mT @ columns) < 1e-6


@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_basis_and_complement_make_the_identity(count: int) -> None:
    basis = orthonormal(8, count)
    outside = complement(basis)
    assert outside.shape == (8, 8 - count)
    assert largest(projector(basis) + projector(outside) - torch.eye(8)) < 2e-15


def test_leading_directions_are_the_strongest_eigenvectors_in_order() -> None:
    both = moments(0)
    directions = leading_directions(both, rank=4)
    for layer in range(LAYERS):
        vectors = scipy.linalg.eigh(both[layer].numpy())[1][:, :-5:-1]
        assert np.abs(np.abs(np.sum(vectors * directions[layer].numpy(), axis=0)) - 1).max() < 1e-12


@pytest.mark.parametrize("rank", [0, WIDTH + 1])
def test_a_rank_beyond_the_width_is_refused(rank: int) -> None:
    expected = rf"No {rank} directions of 16 dimensions can be orthonormal: choose a rank from 1 to 16"
    with pytest.raises(ValueError, match=expected):
        leading_directions(moments(0), rank)
    with pytest.raises(ValueError, match=expected):
        generalised_directions(moments(0), moments(1), rank)


def test_what_is_returned_keeps_nothing_else_alive() -> None:
    # A view would save all the eigenvectors that it was cut from.
    for matrix in (
        complement(normal(WIDTH, 2)),
        leading_directions(moments(0), rank=2),
        generalised_directions(moments(0), moments(1), rank=2),
        principal_subspace(normal(WIDTH, WIDTH), threshold=0.5),
    ):
        assert matrix.untyped_storage().nbytes() == matrix.numel() * matrix.element_size()


# Energy and thresholds


@pytest.mark.parametrize("energy", ["features", "covariance"])
def test_shares_are_squared_singular_values_of_the_inputs_or_of_their_moment(energy: Energy) -> None:
    x = inputs(0)
    squares = torch.linalg.svdvals(x if energy == "features" else second_moments(x)) ** 2
    shares, _ = spectrum(of_unit_energy(second_moments(x), energy))
    assert largest(shares - squares / squares.sum(-1, keepdim=True)) < 1e-14


@pytest.mark.parametrize(
    ("threshold", "on_features", "on_covariance"), [(0.95, 11, 1), (0.98, 28, 1), (0.99, 55, 2)]
)
def test_a_threshold_on_the_covariance_keeps_far_fewer_directions(
    threshold: float, on_features: int, on_covariance: int
) -> None:
    # Singular values 1/i, and as many directions as stay below the threshold: one fewer than reach it.
    squares = 1 / torch.arange(1.0, 769, dtype=torch.float64) ** 2
    assert directions_needed(squares / squares.sum(), threshold) == on_features + 1
    assert directions_needed(squares**2 / (squares**2).sum(), threshold) == on_covariance + 1


def test_as_few_directions_as_reach_the_threshold_are_needed() -> None:
    shares = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    for threshold, counts in {0: [0, 0], 0.5: [1, 2], 0.75: [2, 3], 0.8: [2, 4], 1: [3, 4]}.items():
        assert directions_needed(shares, threshold).tolist() == counts


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_outside_zero_and_one_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=f"threshold of {threshold} is not a share.*choose one from 0 to 1"):
        directions_needed(torch.ones(1), threshold)


def test_the_threshold_rises_in_equal_steps_and_stays_below_its_end() -> None:
    thresholds = [energy_threshold(index, 10, start=0.98, end=1.0) for index in range(10)]
    assert thresholds == pytest.approx(
        [0.98, 0.982, 0.984, 0.986, 0.988, 0.99, 0.992, 0.994, 0.996, 0.998], rel=0, abs=1e-15
    )
    assert energy_threshold(0, 1, start=0.95, end=1.0) == 0.95


@pytest.mark.parametrize("index", [-1, 10])
def test_the_threshold_of_an_experience_outside_the_stream_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=f"no experience {index} in a stream of 10: choose one from 0 to 9"):
        energy_threshold(index, 10, start=0.9)


# Subspaces of weights, and of one experience against others


@pytest.mark.parametrize("threshold", [0.2, 0.85])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_principal_directions_are_the_fewest_singular_vectors_with_the_energy(
    threshold: float, shape: tuple[int, int]
) -> None:
    weight = normal(*shape)
    left, values, right = np.linalg.svd(weight.numpy(), full_matrices=False)
    count = int(np.sum(np.cumsum(values**2) < threshold * np.sum(values**2))) + 1
    for found, vectors in (
        (principal_subspace(weight, threshold), right[:count].T),
        (principal_subspace(weight.mT, threshold), left[:, :count]),
    ):
        assert found.shape == vectors.shape
        assert np.abs(projector(found).numpy() - vectors @ vectors.T).max() < 1e-12


def test_generalised_directions_span_what_scipy_finds() -> None:
    new, old = moments(0), second_moments(normal(LAYERS, 200, WIDTH, seed=1))
    found = generalised_directions(new, old, rank=4)
    assert largest(found.mT @ found - torch.eye(4)) < 1e-14
    for layer in range(LAYERS):
        expected = scipy.linalg.eigh(new[layer].numpy(), old[layer].numpy())[1][:, -4:]
        assert scipy.linalg.subspace_angles(found[layer].numpy(), expected).max() < 1e-10


def test_against_isotropic_moments_generalised_directions_are_the_leading_ones() -> None:
    new = moments(0)
    found = generalised_directions(new, 3 * torch.eye(WIDTH, dtype=torch.float64).expand_as(new), rank=4)
    assert largest(projector(found) - projector(leading_directions(new, rank=4))) < 1e-12


def test_generalised_directions_do_not_depend_on_the_scale_of_the_moments() -> None:
    # Powers of two scale without rounding. Twelve inputs do not fill the width, so the jitter matters.
    new, few = moments(0), second_moments(normal(LAYERS, 12, WIDTH, seed=1))
    directions = generalised_directions(new, few, rank=6)
    assert torch.equal(generalised_directions(2**20 * new, 2**-20 * few, rank=6), directions)


def test_the_strongest_directions_that_older_inputs_never_had_come_first() -> None:
    few = normal(12, WIDTH, seed=1)
    never = torch.from_numpy(scipy.linalg.null_space(few.numpy()))
    found = generalised_directions(moments(0)[0], second_moments(few), rank=2)
    expected = never @ leading_directions(never.mT @ moments(0)[0] @ never, rank=2)
    # The bound is rounding, 1e-16, relative to a jitter of 1e-12.
    assert largest(projector(found) - projector(expected)) < 1e-3


@pytest.mark.parametrize("seed", range(8))
def test_a_direction_without_energy_in_both_moments_is_not_chosen(seed: int) -> None:
    # As after a normalisation layer: the entries of every input sum to zero.
    centred = [x - x.mean(dim=-1, keepdim=True) for x in (inputs(2 * seed), inputs(2 * seed + 1))]
    found = generalised_directions(second_moments(centred[0]), second_moments(centred[1]), rank=4)
    assert largest(found.sum(dim=-2) / WIDTH**0.5) < 1e-2


def test_older_moments_that_are_not_second_moments_are_refused() -> None:
    new = moments(0)
    with pytest.raises(ValueError, match="zero or not finite: compute isolated directions after"):
        generalised_directions(new, torch.zeros_like(new), rank=2)
    with pytest.raises(ValueError, match=r"large negative eigenvalue: give X\^T X / N"):
        generalised_directions(new[0], torch.diag(torch.linspace(-2, 3, WIDTH)), rank=2)
