from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cl_bench.maths.memory import GPM, DualGPM, FirstCount
from cl_bench.maths.subspace import (
    Energy,
    complement,
    directions_needed,
    energy_shares,
    energy_threshold,
    generalised_directions,
    leading_directions,
    orthonormal,
    principal_output_subspace,
    principal_subspace,
    residual,
    right_residual,
)

WIDTH, LAYERS = 16, 3
ENERGIES: tuple[Energy, ...] = ("features", "covariance")
FIRST_COUNTS: tuple[FirstCount, ...] = ("reaching", "below")
SCHEDULE = [energy_threshold(index, 10, start=0.9) for index in range(10)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(seed: int) -> Tensor:
    # Inputs (L, N, d) of one experience, with axes of its own and a spectrum that decays.
    mixing = normal(LAYERS, WIDTH, WIDTH, seed=100 + seed) / torch.arange(1.0, WIDTH + 1)[:, None] ** 2
    return normal(LAYERS, 40, WIDTH, seed=seed) @ mixing


def second_moments(x: Tensor) -> Tensor:
    return x.mT @ x / x.shape[-2]


def moments(seed: int) -> Tensor:
    return second_moments(inputs(seed))


def projector(basis: Tensor) -> Tensor:
    return basis @ basis.mT


def protected(memory: GPM) -> Tensor:
    # What the memory removes from each unit vector: projectors (L, d, d).
    identity = torch.eye(memory.dim, dtype=torch.float64)
    return torch.stack([identity - memory.residual(identity, layer) for layer in range(memory.num_layers)])


def stored(memory: GPM) -> list[Tensor]:
    return list(memory.buffers())


def grown(memory: GPM, experiences: int = 3, threshold: float = 0.9) -> GPM:
    for seed in range(experiences):
        memory.update(moments(seed), threshold)
    return memory


def largest(x: Tensor) -> float:
    return float(x.abs().max())


# Projections and bases


def test_both_residuals_are_products_with_the_projector_on_the_complement() -> None:
    basis, x = orthonormal(normal(2, 6, 3)), normal(2, 6, 6, seed=1)
    outside = torch.eye(6, dtype=torch.float64) - projector(basis)
    assert largest(residual(x, basis) - outside @ x) < 1e-14
    assert largest(right_residual(x, basis) - x @ outside) < 1e-14


def test_a_right_residual_maps_the_span_to_zero() -> None:
    basis = orthonormal(normal(6, 3))
    assert largest(right_residual(normal(4, 6, seed=1), basis) @ basis) < 1e-14


def test_without_directions_everything_is_residual() -> None:
    x, nothing = normal(6, 6), torch.zeros(6, 0, dtype=torch.float64)
    assert torch.equal(residual(x, nothing), x)
    assert torch.equal(right_residual(x, nothing), x)


def test_an_orthonormal_basis_spans_what_the_columns_span_however_long_they_are() -> None:
    columns = normal(2, 8, 3)
    basis = orthonormal(columns * torch.tensor([1e-9, 1.0, 1e9]))
    assert largest(basis.mT @ basis - torch.eye(3)) < 1e-14
    assert largest(projector(basis) - columns @ torch.linalg.pinv(columns)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dependent_columns_are_refused(dtype: torch.dtype) -> None:
    columns = normal(8, 3).to(dtype)
    columns[:, 2] = columns[:, 0] - 2 * columns[:, 1]
    with pytest.raises(ValueError, match=r"3 columns of length 8 are not linearly independent.*: leave out"):
        orthonormal(columns)
    with pytest.raises(ValueError, match="3 columns of length 2 are not linearly independent"):
        orthonormal(normal(2, 3).to(dtype))


@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_basis_and_complement_make_the_identity(count: int) -> None:
    basis = orthonormal(normal(8, count))
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
    with pytest.raises(ValueError, match=expected):
        GPM(LAYERS, WIDTH).free_directions(moments(0), rank)


# Energy and thresholds


def test_energy_shares_are_squared_singular_values_of_the_inputs_or_of_their_second_moment() -> None:
    x = inputs(0)
    for energy, matrix in (("features", x), ("covariance", second_moments(x))):
        squares = torch.linalg.svdvals(matrix) ** 2
        expected = squares / squares.sum(-1, keepdim=True)
        assert largest(energy_shares(second_moments(x), energy) - expected) < 1e-14  # type: ignore[arg-type]


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
def test_a_threshold_that_is_no_share_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=f"threshold of {threshold} is no share.*choose one from 0 to 1"):
        directions_needed(torch.ones(1), threshold)


def test_the_threshold_rises_in_equal_steps_and_stays_below_its_end() -> None:
    thresholds = [energy_threshold(index, 10, start=0.98, end=1.0) for index in range(10)]
    assert thresholds == pytest.approx(
        [0.98, 0.982, 0.984, 0.986, 0.988, 0.99, 0.992, 0.994, 0.996, 0.998], rel=0, abs=1e-15
    )
    assert energy_threshold(0, 1, start=0.95, end=1.0) == 0.95


@pytest.mark.parametrize("index", [-1, 10])
def test_the_threshold_of_no_experience_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=f"no experience {index} in a stream of 10: choose one from 0 to 9"):
        energy_threshold(index, 10, start=0.9)


# Memories


def grown_by_svd(
    basis: NDArray[np.float64], x: NDArray[np.float64], threshold: float, first: FirstCount
) -> NDArray[np.float64]:
    # The rule as the paper and the released code state it, on singular values of the matrix itself.
    total = np.sum(x**2)
    outside = x.T - basis @ basis.T @ x.T
    vectors, values, _ = scipy.linalg.svd(outside, full_matrices=False)
    shares = values**2 / total
    if basis.shape[1] == 0 and first == "below":
        count = max(int(np.sum(np.cumsum(shares) < threshold)), 1)
    else:
        count, held = 0, 1 - np.sum(outside**2) / total
        while held < threshold:
            held += shares[count]
            count += 1
    return np.hstack([basis, vectors[:, :count]])


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("first", FIRST_COUNTS)
def test_both_memories_protect_what_an_svd_of_the_inputs_finds_over_ten_experiences(
    energy: Energy, first: FirstCount
) -> None:
    one, dual = GPM(LAYERS, WIDTH, energy, first), DualGPM(LAYERS, WIDTH, energy, first)
    expected = [np.zeros((WIDTH, 0)) for _ in range(LAYERS)]
    for seed, threshold in enumerate(SCHEDULE):
        x = inputs(seed)
        matrices = (x if energy == "features" else second_moments(x)).numpy()
        expected = [
            grown_by_svd(basis, matrix, threshold, first)
            for basis, matrix in zip(expected, matrices, strict=True)
        ]
        for memory in (one, dual):
            memory.update(second_moments(x), threshold)
            assert memory.dims == [basis.shape[1] for basis in expected]
            for found, basis in zip(protected(memory), expected, strict=True):
                assert np.abs(found.numpy() - basis @ basis.T).max() < 1e-8
        assert largest(protected(one) - protected(dual)) < 1e-12
    assert min(dual.dims) > WIDTH / 2  # the other form was reached


@pytest.mark.parametrize("kind", [GPM, DualGPM])
@pytest.mark.parametrize("energy", ENERGIES)
def test_a_memory_holds_the_energy_asked_for_and_only_grows(kind: type[GPM], energy: Energy) -> None:
    memory = kind(LAYERS, WIDTH, energy)
    for seed, threshold in enumerate(SCHEDULE):
        before, dims = protected(memory), memory.dims
        memory.update(moments(seed), threshold)
        assert (memory.held_energy(moments(seed)) > threshold - 1e-12).all()
        assert all(new >= old for new, old in zip(memory.dims, dims, strict=True))
        assert largest(protected(memory) @ before - before) < 1e-13  # what was protected stays so


def test_one_direction_fewer_would_not_hold_the_energy() -> None:
    memory = grown(GPM(LAYERS, WIDTH))
    for layer in range(LAYERS):
        held = memory.basis(layer)[:, :-1]
        last = moments(2)[layer]
        assert (held * (last @ held)).sum() / last.trace() < 0.9


def test_new_directions_are_orthogonal_to_the_old_ones_which_stay_bit_for_bit() -> None:
    memory = GPM(LAYERS, WIDTH)
    memory.update(moments(0), 0.9)
    before = [basis.clone() for basis in stored(memory)]
    memory.update(moments(1), 0.9)
    for old, basis in zip(before, stored(memory), strict=True):
        count = old.shape[1]
        assert torch.equal(basis[:, :count], old)
        assert basis.shape[1] > count
        assert largest(basis[:, count:].mT @ old) < 1e-14


@pytest.mark.parametrize("kind", [GPM, DualGPM])
def test_the_basis_is_orthonormal_and_its_projection_idempotent_in_single_precision(kind: type[GPM]) -> None:
    memory = kind(LAYERS, WIDTH)
    for seed, threshold in enumerate(SCHEDULE):
        memory.update(moments(seed).float(), threshold)
    eye = torch.eye(WIDTH)
    for layer in range(LAYERS):
        basis = memory.basis(layer)
        assert basis.dtype == torch.float32
        assert (basis.mT @ basis - torch.eye(basis.shape[1])).norm() < 1e-6
        outside = memory.residual(eye, layer)
        assert largest(outside - outside.mT) < 1e-6
        assert largest(memory.residual(outside, layer) - outside) < 1e-6
        assert largest(memory.residual(basis, layer)) < 1e-6


def test_single_and_double_precision_agree_over_ten_experiences() -> None:
    wide, narrow, dual = GPM(LAYERS, WIDTH), GPM(LAYERS, WIDTH), DualGPM(LAYERS, WIDTH)
    for seed, threshold in enumerate(SCHEDULE):
        wide.update(moments(seed), threshold)
        for memory in (narrow, dual):
            memory.update(moments(seed).float(), threshold)
            assert memory.dims == wide.dims
            assert largest(protected(memory) - protected(wide)) < 1e-4


def test_a_dual_memory_stores_at_most_half_of_the_dimensions() -> None:
    memory = DualGPM(LAYERS, WIDTH)
    forms = set()
    for seed, threshold in enumerate(SCHEDULE):
        memory.update(moments(seed), threshold)
        assert max(matrix.shape[1] for matrix in stored(memory)) <= WIDTH / 2
        forms |= {name.split("_")[0] for name in memory.state_dict()}
    assert forms == {"basis", "complement"}


def test_switching_stores_exactly_the_complement() -> None:
    one, dual = GPM(LAYERS, WIDTH), DualGPM(LAYERS, WIDTH)
    while "complement_0" not in dual.state_dict():
        for memory in (one, dual):
            memory.update(moments(len(stored(memory)) + sum(memory.dims)), 0.9)
    basis, free = one.basis(0), dual.state_dict()["complement_0"]
    assert basis.shape[1] + free.shape[1] == WIDTH
    assert largest(torch.eye(WIDTH) - projector(basis) - projector(free)) < 5e-15
    assert largest(projector(dual.basis(0)) - projector(basis)) < 5e-15


def test_a_first_experience_may_take_more_than_half_and_they_are_protected() -> None:
    flat = torch.diag(torch.linspace(2, 1, WIDTH, dtype=torch.float64)).expand(LAYERS, WIDTH, WIDTH)
    memory = DualGPM(LAYERS, WIDTH)
    memory.update(flat, 0.9)
    kept = memory.dims[0]
    assert WIDTH / 2 < kept < WIDTH
    assert largest(protected(memory)[0] - torch.diag((torch.arange(WIDTH) < kept).double())) < 1e-14


@pytest.mark.parametrize("kind", [GPM, DualGPM])
def test_all_energy_is_held_by_the_span_of_few_inputs_and_no_more(kind: type[GPM]) -> None:
    memory = kind(LAYERS, WIDTH)
    x = normal(LAYERS, 10, WIDTH)
    memory.update(second_moments(x), 1.0)
    assert memory.dims == [10] * LAYERS
    assert largest(torch.stack([memory.right_residual(x[layer], layer) for layer in range(LAYERS)])) < 1e-13
    before = [matrix.clone() for matrix in stored(memory)]
    memory.update(second_moments(normal(LAYERS, 5, 10, seed=1) @ x), 1.0)
    assert all(map(torch.equal, stored(memory), before))


@pytest.mark.parametrize("kind", [GPM, DualGPM])
def test_a_full_memory_leaves_nothing_and_takes_nothing_more(kind: type[GPM]) -> None:
    memory = kind(LAYERS, WIDTH)
    memory.update(torch.eye(WIDTH).expand(LAYERS, WIDTH, WIDTH), 1.0)
    memory.update(moments(0), 1.0)
    assert memory.dims == [WIDTH] * LAYERS
    assert largest(memory.residual(normal(WIDTH, 2), 0)) < 1e-14
    assert torch.equal(memory.held_energy(moments(1)), torch.ones(LAYERS, dtype=torch.float64))


def test_layers_do_not_depend_on_each_other() -> None:
    together = grown(DualGPM(LAYERS, WIDTH))
    for layer in range(LAYERS):
        alone = DualGPM(1, WIDTH)
        for seed in range(3):
            alone.update(moments(seed)[layer : layer + 1], 0.9)
        assert largest(protected(alone)[0] - protected(together)[layer]) < 1e-14


def test_the_scale_of_the_moments_has_no_effect() -> None:
    one, other = GPM(LAYERS, WIDTH, "covariance"), GPM(LAYERS, WIDTH, "covariance")
    for seed in range(3):
        one.update(moments(seed), 0.99)
        other.update(1e-30 * moments(seed), 0.99)
    assert largest(protected(one) - protected(other)) < 1e-12


def test_moments_of_what_lies_outside_and_the_energy_inside_suffice_for_the_threshold() -> None:
    # What online estimation may gather: R^T R of the residuals, and two sums of squares.
    memory = grown(GPM(LAYERS, WIDTH), experiences=1)
    x = inputs(1)
    basis = memory.basis(0)
    outside = right_residual(x[0], basis)
    shares = torch.linalg.eigvalsh(outside.mT @ outside).flip(0).clamp(min=0) / x[0].square().sum()
    inside = (x[0] @ basis).square().sum() / x[0].square().sum()
    counts = int((inside + shares.cumsum(0) < 0.95).sum()) + 1
    memory.update(second_moments(x), 0.95)
    assert memory.dims[0] == basis.shape[1] + counts


@pytest.mark.parametrize("kind", [GPM, DualGPM])
def test_bases_serve_autograd_even_if_they_were_made_with_gradients_on(kind: type[GPM]) -> None:
    memory = kind(LAYERS, WIDTH)
    weight = nn.Parameter(torch.ones(2, WIDTH))
    memory.update(moments(0) * weight.sum(), 0.9)
    assert not any(matrix.requires_grad for matrix in stored(memory))
    memory.right_residual(weight, 0).sum().backward()
    assert weight.grad is not None
    assert largest(weight.grad - memory.right_residual(torch.ones(2, WIDTH), 0)) < 1e-6


@pytest.mark.parametrize("kind", [GPM, DualGPM])
@pytest.mark.parametrize("experiences", [1, 7])
def test_mixed_precision_changes_neither_a_memory_nor_its_projections(
    kind: type[GPM], experiences: int
) -> None:
    memory = grown(kind(LAYERS, WIDTH), experiences, threshold=0.95)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = grown(kind(LAYERS, WIDTH), experiences, threshold=0.95)
        down = mixed.right_residual(torch.ones(2, WIDTH), 0)
        directions = mixed.free_directions(moments(0).float(), rank=1)
    assert all(map(torch.equal, stored(mixed), stored(memory)))
    assert torch.equal(down, memory.right_residual(torch.ones(2, WIDTH), 0))
    assert torch.equal(directions, memory.free_directions(moments(0).float(), rank=1))
    basis = memory.basis(0).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = right_residual(torch.ones(2, WIDTH), basis), residual(torch.ones(WIDTH, 2), basis)
    assert largest(outside[0] @ basis) < 1e-6
    assert largest(basis.mT @ outside[1]) < 1e-6


# What is free


@pytest.mark.parametrize("kind", [GPM, DualGPM])
@pytest.mark.parametrize("experiences", [0, 1, 4])
def test_free_directions_are_left_singular_vectors_of_the_residual(kind: type[GPM], experiences: int) -> None:
    memory = grown(kind(LAYERS, WIDTH), experiences)
    x = normal(LAYERS, WIDTH, 5) * torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    directions = memory.free_directions(x, rank=3)
    for layer in range(LAYERS):
        outside = x[layer] - protected(memory)[layer] @ x[layer]
        vectors = scipy.linalg.svd(outside.numpy())[0][:, :3]
        assert np.abs(np.abs(np.sum(vectors * directions[layer].numpy(), axis=0)) - 1).max() < 1e-10


@pytest.mark.parametrize("kind", [GPM, DualGPM])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_free_directions_are_orthonormal_and_avoid_what_is_protected(
    kind: type[GPM], dtype: torch.dtype, tolerance: float
) -> None:
    memory = kind(LAYERS, WIDTH)
    for seed in range(3):
        memory.update(moments(seed).to(dtype), 0.9)
    directions = memory.free_directions(moments(3).to(dtype), rank=2)
    assert directions.dtype == dtype
    assert largest(directions.mT @ directions - torch.eye(2)) < tolerance
    for layer in range(LAYERS):
        assert largest(directions[layer].mT @ memory.basis(layer)) < tolerance


@pytest.mark.parametrize("kind", [GPM, DualGPM])
@pytest.mark.parametrize("rows", [1, 3])
def test_directions_without_energy_still_avoid_what_is_protected(kind: type[GPM], rows: int) -> None:
    # One input outside the span, or none: singular vectors of the residual would then be arbitrary.
    memory = grown(kind(LAYERS, WIDTH), experiences=1)
    x = normal(LAYERS, WIDTH, rows)
    if rows == 1:
        x = protected(memory) @ x
    directions = memory.free_directions(x, rank=5)
    assert largest(directions.mT @ directions - torch.eye(5)) < 1e-14
    assert largest(protected(memory) @ directions) < 1e-13


def test_free_directions_of_a_gradient_leave_the_least_behind() -> None:
    # Eckart and Young: what rank r cannot reach are the singular values after the first r.
    memory = grown(GPM(LAYERS, WIDTH))
    gradients = normal(LAYERS, 20, WIDTH)
    directions = memory.free_directions(gradients.mT, rank=4)
    for layer in range(LAYERS):
        safe = memory.right_residual(gradients[layer], layer)
        left = (safe - safe @ projector(directions[layer])).norm()
        assert abs(left - torch.linalg.svdvals(safe)[4:].norm()) < 1e-12


def test_a_rank_beyond_what_is_free_is_refused() -> None:
    memory = DualGPM(2, WIDTH)
    full = torch.diag((torch.arange(WIDTH) < 14).double())
    memory.update(torch.stack([moments(0)[0], full]), 0.999)
    assert memory.free_directions(moments(0)[:2], rank=2).shape == (2, WIDTH, 2)
    with pytest.raises(ValueError, match="Layer 1 has 2 of 16 dimensions free, fewer than the rank 3: lower"):
        memory.free_directions(moments(0)[:2], rank=3)


def test_a_rank_beyond_what_is_free_may_leave_zeros_with_a_warning() -> None:
    memory = DualGPM(2, WIDTH)
    full = torch.diag((torch.arange(WIDTH) < 14).double())
    memory.update(torch.stack([moments(0)[0], full]), 0.999)
    with pytest.warns(UserWarning, match="Layer 1 has 2 of 16 dimensions free, fewer than the rank 3"):
        found = memory.free_directions(moments(0)[:2], rank=3, short="zeros")
    norms = found.norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]).to(norms))
    assert memory.residual(found[1], 1).sub(found[1]).abs().max() < 1e-12


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_moments_without_energy_or_with_broken_entries_are_refused(bad: float) -> None:
    broken = moments(0)
    broken[1] = bad
    memory = GPM(LAYERS, WIDTH)
    with pytest.raises(ValueError, match="Matrix 1 has no energy, or entries that are not finite: measure"):
        memory.update(broken, 0.9)
    assert memory.dims == [0] * LAYERS


@pytest.mark.parametrize("shape", [(WIDTH, WIDTH), (2, WIDTH, WIDTH), (LAYERS, WIDTH + 1, WIDTH + 1)])
def test_moments_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    memory = GPM(LAYERS, WIDTH)
    with pytest.raises(
        ValueError, match="do not fit a memory of 3 layers of width 16: stack one matrix of 16"
    ):
        memory.update(torch.ones(shape), 0.9)


# State


def reloaded(memory: nn.Module, fresh: nn.Module, **options: Any) -> nn.Module:
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True), **options)
    return fresh


@pytest.mark.parametrize("kind", [GPM, DualGPM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("assign", [False, True])
def test_a_memory_of_any_width_takes_a_saved_state_and_goes_on_as_if_never_stopped(
    kind: type[GPM], dtype: torch.dtype, assign: bool
) -> None:
    saved = kind(LAYERS, WIDTH)
    saved.update(moments(0).to(dtype), 0.95)
    fuller, fresh = grown(kind(LAYERS, WIDTH), experiences=9, threshold=0.99), kind(LAYERS, WIDTH)
    assert fuller.dims > saved.dims
    for other in (fuller, fresh):
        # As part of a strategy, so that the names have a prefix.
        reloaded(nn.ModuleDict({"memory": saved}), nn.ModuleDict({"memory": other}), assign=assign)
    for seed, threshold in enumerate(SCHEDULE):
        for other in (fuller, fresh):
            assert other.state_dict().keys() == saved.state_dict().keys()
            assert all(map(torch.equal, stored(other), stored(saved)))
            assert {matrix.dtype for matrix in stored(other)} == {dtype}
        for memory in (saved, fuller, fresh):
            memory.update(moments(seed).to(dtype), threshold)


def test_a_state_in_either_form_takes_the_place_of_the_other() -> None:
    empty, full = DualGPM(LAYERS, WIDTH), grown(DualGPM(LAYERS, WIDTH), experiences=9, threshold=0.99)
    assert set(full.state_dict()) == {"complement_0", "complement_1", "complement_2"}
    assert reloaded(full, DualGPM(LAYERS, WIDTH)).state_dict().keys() == full.state_dict().keys()
    assert reloaded(empty, full).state_dict().keys() == empty.state_dict().keys()
    assert full.dims == [0] * LAYERS


def test_a_state_of_another_kind_is_refused() -> None:
    saved = grown(DualGPM(LAYERS, WIDTH), experiences=9, threshold=0.99)
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*basis_0.*Unexpected.*complement_0"):
        reloaded(saved, GPM(LAYERS, WIDTH))
    with pytest.raises(RuntimeError, match="size mismatch for complement_0"):
        reloaded(saved, DualGPM(LAYERS, WIDTH + 1))
    with pytest.raises(RuntimeError, match=r"Missing.*basis_3"):
        reloaded(saved, DualGPM(LAYERS + 1, WIDTH))


def test_neither_a_memory_nor_what_is_returned_keeps_more_alive_than_itself() -> None:
    # A view would save all the eigenvectors that it was cut from.
    memories = [
        grown(kind(LAYERS, WIDTH), experiences, 0.99) for kind in (GPM, DualGPM) for experiences in (1, 9)
    ]
    returned = [
        complement(normal(WIDTH, 2)),
        leading_directions(moments(0), rank=2),
        generalised_directions(moments(0), moments(1), rank=2),
        principal_subspace(normal(WIDTH, WIDTH), threshold=0.5),
        memories[0].free_directions(moments(0), rank=2),
    ]
    for matrix in returned + [matrix for memory in memories for matrix in stored(memory)]:
        assert matrix.untyped_storage().nbytes() == matrix.numel() * matrix.element_size()


# Subspaces of weights, and of one experience against others


@pytest.mark.parametrize("threshold", [0.2, 0.85])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_principal_directions_are_the_fewest_singular_vectors_that_hold_the_energy(
    threshold: float, shape: tuple[int, int]
) -> None:
    weight = normal(*shape)
    left, values, right = np.linalg.svd(weight.numpy(), full_matrices=False)
    count = int(np.sum(np.cumsum(values**2) < threshold * np.sum(values**2))) + 1
    for found, vectors in (
        (principal_subspace(weight, threshold), right[:count].T),
        (principal_output_subspace(weight, threshold), left[:, :count]),
    ):
        assert found.shape == vectors.shape
        assert np.abs(projector(found).numpy() - vectors @ vectors.T).max() < 1e-12


def test_a_memory_can_start_from_the_principal_directions_of_weights() -> None:
    weights = normal(LAYERS, 24, WIDTH)
    memory = GPM(LAYERS, WIDTH)
    memory.update(weights.mT @ weights, 0.85)
    for layer in range(LAYERS):
        expected = projector(principal_subspace(weights[layer], 0.85))
        assert largest(protected(memory)[layer] - expected) < 1e-12


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


def test_what_older_inputs_never_had_comes_first_and_the_strongest_of_it() -> None:
    few = normal(12, WIDTH, seed=1)
    never = torch.from_numpy(scipy.linalg.null_space(few.numpy()))
    found = generalised_directions(moments(0)[0], second_moments(few), rank=2)
    expected = never @ leading_directions(never.mT @ moments(0)[0] @ never, rank=2)
    # Rounding, 1e-16, weighs against a jitter of 1e-12.
    assert largest(projector(found) - projector(expected)) < 1e-3


@pytest.mark.parametrize("seed", range(8))
def test_a_direction_without_energy_in_both_moments_is_not_chosen(seed: int) -> None:
    # As behind a normalisation layer: the entries of every input sum to zero.
    centred = [x - x.mean(dim=-1, keepdim=True) for x in (inputs(2 * seed), inputs(2 * seed + 1))]
    found = generalised_directions(second_moments(centred[0]), second_moments(centred[1]), rank=4)
    assert largest(found.sum(dim=-2) / WIDTH**0.5) < 1e-2


def test_older_moments_that_are_no_second_moments_are_refused() -> None:
    new = moments(0)
    with pytest.raises(ValueError, match="zero or not finite: ask for isolated directions after"):
        generalised_directions(new, torch.zeros_like(new), rank=2)
    with pytest.raises(ValueError, match=r"large negative eigenvalue: give X\^T X / N"):
        generalised_directions(new[0], torch.diag(torch.linspace(-2, 3, WIDTH)), rank=2)
