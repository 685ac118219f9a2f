from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cl_bench.maths.memory import GPM, Count, DualGPM, at_most, below_first, reaching
from cl_bench.maths.subspace import Energy, energy_threshold, principal_subspace, right_residual

WIDTH, LAYERS = 16, 3
SCHEDULE = [energy_threshold(index, 10, start=0.9) for index in range(10)]
KINDS = pytest.mark.parametrize("kind", [GPM, DualGPM])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


def protected(memory: GPM) -> Tensor:
    """What the memory removes from each unit vector: a projector (d, d) for each projection."""
    identity = torch.eye(memory.dim, dtype=torch.float64)
    return torch.stack([identity - memory.residual(identity, one) for one in range(len(memory.projections))])


def held(memory: GPM, found: Tensor) -> Tensor:
    """Share of the energy of moments (L, d, d) that is protected, (L,)."""
    whole = found if memory.energy == "features" else found @ found
    traces = [matrix.diagonal(dim1=-2, dim2=-1).sum(-1) for matrix in (protected(memory) @ whole, whole)]
    return traces[0] / traces[1]


def stored(memory: GPM) -> list[Tensor]:
    return list(memory.buffers())


def grown(memory: GPM, experiences: int = 3, threshold: float = 0.9) -> GPM:
    for seed in range(experiences):
        memory.update(moments(seed), reaching(threshold))
    return memory


def largest(x: Tensor) -> float:
    return float(x.abs().max())


# What is protected


def grown_by_svd(
    basis: NDArray[np.float64], x: NDArray[np.float64], threshold: float, *, below: bool
) -> NDArray[np.float64]:
    """The rule as the paper and the released code state it, on singular values of the matrix itself."""
    total = np.sum(x**2)
    outside = x.T - basis @ basis.T @ x.T
    vectors, values, _ = scipy.linalg.svd(outside, full_matrices=False)
    shares = values**2 / total
    if basis.shape[1] == 0 and below:
        count = max(int(np.sum(np.cumsum(shares) < threshold)), 1)
    else:
        count, already = 0, 1 - np.sum(outside**2) / total
        while already < threshold:
            already += shares[count]
            count += 1
    return np.hstack([basis, vectors[:, :count]])


@pytest.mark.parametrize("energy", ["features", "covariance"])
@pytest.mark.parametrize("rule", [reaching, below_first])
def test_both_memories_protect_what_an_svd_of_the_inputs_finds(
    energy: Energy, rule: Callable[[float], Count]
) -> None:
    one, dual = GPM(LAYERS, WIDTH, energy), DualGPM(LAYERS, WIDTH, energy)
    expected = [np.zeros((WIDTH, 0)) for _ in range(LAYERS)]
    for seed, threshold in enumerate(SCHEDULE):
        x = inputs(seed)
        matrices = (x if energy == "features" else second_moments(x)).numpy()
        expected = [
            grown_by_svd(basis, matrix, threshold, below=rule is below_first)
            for basis, matrix in zip(expected, matrices, strict=True)
        ]
        for memory in (one, dual):
            memory.update(second_moments(x), rule(threshold))
            assert memory.dims == [basis.shape[1] for basis in expected]
            for found, basis in zip(protected(memory), expected, strict=True):
                assert np.abs(found.numpy() - basis @ basis.T).max() < 1e-8
        assert largest(protected(one) - protected(dual)) < 1e-12
    assert min(dual.dims) > WIDTH / 2  # the other form was reached


@KINDS
@pytest.mark.parametrize("energy", ["features", "covariance"])
def test_a_memory_holds_the_threshold_of_the_energy_and_only_grows(kind: type[GPM], energy: Energy) -> None:
    memory = kind(LAYERS, WIDTH, energy)
    for seed, threshold in enumerate(SCHEDULE):
        before, dims = protected(memory), memory.dims
        memory.update(moments(seed), reaching(threshold))
        assert (held(memory, moments(seed)) > threshold - 1e-12).all()
        assert all(new >= old for new, old in zip(memory.dims, dims, strict=True))
        assert largest(protected(memory) @ before - before) < 1e-13  # what was protected stays so


def test_one_direction_fewer_would_not_hold_the_energy() -> None:
    memory = grown(GPM(LAYERS, WIDTH))
    for layer in range(LAYERS):
        basis = memory.basis(layer)[:, :-1]
        last = moments(2)[layer]
        assert (basis * (last @ basis)).sum() / last.trace() < 0.9


def test_new_directions_are_orthogonal_to_the_old_ones_which_stay_bit_for_bit() -> None:
    memory = GPM(LAYERS, WIDTH)
    memory.update(moments(0), reaching(0.9))
    before = [basis.clone() for basis in stored(memory)]
    memory.update(moments(1), reaching(0.9))
    for old, basis in zip(before, stored(memory), strict=True):
        count = old.shape[1]
        assert torch.equal(basis[:, :count], old)
        assert basis.shape[1] > count
        assert largest(basis[:, count:].mT @ old) < 1e-14


@KINDS
def test_a_basis_is_orthonormal_and_its_projection_idempotent_in_float32(kind: type[GPM]) -> None:
    memory = kind(LAYERS, WIDTH)
    for seed, threshold in enumerate(SCHEDULE):
        memory.update(moments(seed).float(), reaching(threshold))
    eye = torch.eye(WIDTH)
    for layer in range(LAYERS):
        basis = memory.basis(layer)
        assert basis.dtype == torch.float32
        assert (basis.mT @ basis - torch.eye(basis.shape[1])).norm() < 1e-6
        outside = memory.residual(eye, layer)
        assert largest(outside - outside.mT) < 1e-6
        assert largest(memory.residual(outside, layer) - outside) < 1e-6
        assert largest(memory.residual(basis, layer)) < 1e-6


def test_float32_and_float64_agree_over_ten_experiences() -> None:
    wide, narrow, dual = GPM(LAYERS, WIDTH), GPM(LAYERS, WIDTH), DualGPM(LAYERS, WIDTH)
    for seed, threshold in enumerate(SCHEDULE):
        wide.update(moments(seed), reaching(threshold))
        for memory in (narrow, dual):
            memory.update(moments(seed).float(), reaching(threshold))
            assert memory.dims == wide.dims
            assert largest(protected(memory) - protected(wide)) < 1e-4


@KINDS
def test_the_span_of_few_inputs_holds_all_their_energy_and_takes_no_more(kind: type[GPM]) -> None:
    memory = kind(LAYERS, WIDTH)
    x = normal(LAYERS, 10, WIDTH)
    memory.update(second_moments(x), reaching(1.0))
    assert memory.dims == [10] * LAYERS
    assert largest(torch.stack([memory.right_residual(x[layer], layer) for layer in range(LAYERS)])) < 1e-13
    before = [matrix.clone() for matrix in stored(memory)]
    memory.update(second_moments(normal(LAYERS, 5, 10, seed=1) @ x), reaching(1.0))
    assert all(map(torch.equal, stored(memory), before))


@KINDS
def test_a_full_memory_leaves_nothing_free_and_takes_nothing_more(kind: type[GPM]) -> None:
    memory = kind(LAYERS, WIDTH)
    memory.update(torch.eye(WIDTH).expand(LAYERS, WIDTH, WIDTH), reaching(1.0))
    memory.update(moments(0), reaching(1.0))
    assert memory.dims == [WIDTH] * LAYERS
    assert largest(memory.residual(normal(WIDTH, 2), 0)) == 0
    assert largest(held(memory, moments(1)) - 1) < 1e-14


def test_bases_do_not_depend_on_each_other() -> None:
    together = grown(DualGPM(LAYERS, WIDTH))
    for layer in range(LAYERS):
        single = DualGPM(1, WIDTH)
        for seed in range(3):
            single.update(moments(seed)[layer : layer + 1], reaching(0.9))
        assert largest(protected(single)[0] - protected(together)[layer]) < 1e-14


def test_the_scale_of_the_moments_has_no_effect() -> None:
    one, other = GPM(LAYERS, WIDTH, "covariance"), GPM(LAYERS, WIDTH, "covariance")
    for seed in range(3):
        one.update(moments(seed), reaching(0.99))
        other.update(1e-30 * moments(seed), reaching(0.99))
    assert largest(protected(one) - protected(other)) < 1e-12


def test_moments_of_the_residual_and_the_energy_inside_suffice_for_the_threshold() -> None:
    # What online estimation may gather: R^T R of the residuals, and two sums of squares.
    memory = grown(GPM(LAYERS, WIDTH), experiences=1)
    x = inputs(1)
    basis = memory.basis(0)
    outside = right_residual(x[0], basis)
    shares = torch.linalg.eigvalsh(outside.mT @ outside).flip(0).clamp(min=0) / x[0].square().sum()
    inside = (x[0] @ basis).square().sum() / x[0].square().sum()
    counts = int((inside + shares.cumsum(0) < 0.95).sum()) + 1
    memory.update(second_moments(x), reaching(0.95))
    assert memory.dims[0] == basis.shape[1] + counts


@KINDS
def test_bases_made_with_gradients_on_carry_none(kind: type[GPM]) -> None:
    memory = kind(LAYERS, WIDTH)
    weight = nn.Parameter(torch.ones(2, WIDTH))
    memory.update(moments(0) * weight.sum(), reaching(0.9))
    memory.replace(1, torch.eye(WIDTH)[:, :2] * weight.mean())
    assert not any(matrix.requires_grad for matrix in stored(memory))
    memory.right_residual(weight, 0).sum().backward()
    assert weight.grad is not None
    assert largest(weight.grad - memory.right_residual(torch.ones(2, WIDTH), 0)) < 1e-6


@KINDS
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


def test_a_memory_keeps_nothing_else_alive() -> None:
    # A view would save all the eigenvectors that it was cut from.
    memories = [
        grown(kind(LAYERS, WIDTH), experiences, 0.99) for kind in (GPM, DualGPM) for experiences in (1, 9)
    ]
    for count in (2, 12):
        for memory in memories[:2]:
            memory.replace(0, torch.linalg.qr(normal(WIDTH, WIDTH)).Q[:, :count])
    for matrix in [
        memories[0].free_directions(moments(0), rank=2),
        *(matrix for memory in memories for matrix in stored(memory)),
    ]:
        assert matrix.untyped_storage().nbytes() == matrix.numel() * matrix.element_size()


# The dual form


def test_a_dual_memory_stores_at_most_half_of_the_dimensions() -> None:
    memory = DualGPM(LAYERS, WIDTH)
    forms = set()
    for seed, threshold in enumerate(SCHEDULE):
        memory.update(moments(seed), reaching(threshold))
        assert max(matrix.shape[1] for matrix in stored(memory)) <= WIDTH / 2
        forms |= {name.split("_")[0] for name in memory.state_dict()}
    assert forms == {"basis", "complement"}


def test_switching_stores_exactly_the_complement() -> None:
    one, dual = GPM(LAYERS, WIDTH), DualGPM(LAYERS, WIDTH)
    while "complement_0" not in dual.state_dict():
        for memory in (one, dual):
            memory.update(moments(len(stored(memory)) + sum(memory.dims)), reaching(0.9))
    basis, free = one.basis(0), dual.state_dict()["complement_0"]
    assert basis.shape[1] + free.shape[1] == WIDTH
    assert largest(torch.eye(WIDTH) - projector(basis) - projector(free)) < 5e-15
    assert largest(projector(dual.basis(0)) - projector(basis)) < 5e-15


def test_a_first_experience_may_protect_more_than_half_of_the_dimensions() -> None:
    flat = torch.diag(torch.linspace(2, 1, WIDTH, dtype=torch.float64)).expand(LAYERS, WIDTH, WIDTH)
    memory = DualGPM(LAYERS, WIDTH)
    memory.update(flat, reaching(0.9))
    kept = memory.dims[0]
    assert WIDTH / 2 < kept < WIDTH
    assert largest(protected(memory)[0] - torch.diag((torch.arange(WIDTH) < kept).double())) < 1e-14


# Replacing a basis, and sharing one


@KINDS
def test_replacing_protects_the_new_span_and_nothing_else(kind: type[GPM]) -> None:
    memory = grown(kind(LAYERS, WIDTH))
    before = protected(memory)
    for count in (12, 3, 0, WIDTH):  # larger and smaller than half of the width
        basis = torch.linalg.qr(normal(WIDTH, count, seed=count)).Q
        memory.replace(1, basis)
        assert memory.dims[1] == count
        assert largest(protected(memory)[1] - projector(basis)) < 1e-13
        assert torch.equal(protected(memory)[::2], before[::2])
        if kind is DualGPM:
            assert max(matrix.shape[1] for matrix in stored(memory)) <= WIDTH / 2


@KINDS
def test_a_replaced_basis_grows_like_any_other(kind: type[GPM]) -> None:
    memory = kind(LAYERS, WIDTH)
    starts = [torch.linalg.qr(normal(WIDTH, count, seed=count)).Q for count in (2, 6, 9)]
    for projection, basis in enumerate(starts):
        memory.replace(projection, basis)
    memory.update(moments(0), reaching(0.95))
    for found, basis, x in zip(protected(memory), starts, inputs(0), strict=True):
        expected = grown_by_svd(basis.numpy(), x.numpy(), 0.95, below=False)
        assert np.abs(found.numpy() - expected @ expected.T).max() < 1e-10


def test_a_replaced_basis_is_copied_in_the_type_of_the_memory() -> None:
    memory, basis = GPM(1, WIDTH, dtype=torch.float32), torch.eye(WIDTH)[:, :2].clone()
    memory.replace(0, basis)
    basis.zero_()
    assert torch.equal(memory.basis(0), torch.eye(WIDTH)[:, :2])
    memory.replace(0, torch.eye(WIDTH, dtype=torch.float64)[:, :2])
    assert memory.basis(0).dtype == torch.float32


@pytest.mark.parametrize("shape", [(WIDTH,), (WIDTH + 1, 2)])
def test_a_basis_of_another_width_is_refused(shape: tuple[int, ...]) -> None:
    memory = GPM(LAYERS, WIDTH)
    with pytest.raises(ValueError, match=r"inputs of width 16: give orthonormal columns \(16, k\)"):
        memory.replace(0, torch.zeros(shape))


@KINDS
def test_projections_may_share_a_basis(kind: type[GPM]) -> None:
    shared, single = kind([0, 0, 1, 0], WIDTH), kind(2, WIDTH)
    for seed in range(2):
        for memory in (shared, single):
            memory.update(moments(seed)[:2], reaching(0.9))
    of_projection = [0, 0, 1, 0]
    assert shared.state_dict().keys() == single.state_dict().keys()
    assert shared.dims == [single.dims[number] for number in of_projection]
    assert torch.equal(protected(shared), protected(single)[of_projection])
    directions = shared.free_directions(moments(2)[:2], rank=2)
    assert torch.equal(directions, single.free_directions(moments(2)[:2], rank=2)[of_projection])
    shared.replace(3, torch.eye(WIDTH, 2))
    assert shared.dims == [2, 2, single.dims[1], 2]


# How many directions are taken


def test_a_rule_sees_the_shares_of_free_directions_and_how_many_are_protected() -> None:
    memory = grown(GPM(LAYERS, WIDTH), experiences=1)
    dims, missing = memory.dims, 1 - held(memory, moments(1))
    seen: list[Tensor] = []

    def one_for_the_first(shares: Tensor, protected: Sequence[int]) -> list[int]:
        assert protected == dims
        seen.append(shares)
        return [1, 0, 0]

    memory.update(moments(1), one_for_the_first)
    assert memory.dims == [dims[0] + 1, *dims[1:]]
    assert seen[0].shape == (LAYERS, WIDTH) and seen[0].dtype == torch.float64
    assert bool((seen[0].diff() <= 0).all())  # strongest first
    assert largest(seen[0].sum(dim=1) - missing) < 1e-12
    gained = held(memory, moments(1)) - (1 - missing)
    assert largest(gained - torch.stack([seen[0][0, 0], *torch.zeros(2).double()])) < 1e-12


@pytest.mark.parametrize("alpha", [0.5, 5.0, 20.0])
@pytest.mark.parametrize("experience", [0, 4])
def test_a_method_may_bring_a_rule_without_a_threshold(alpha: float, experience: int) -> None:
    """SplitLoRA splits one running moment at the k where (t + 1) (1 - held) - alpha (d - k) / d is least."""

    def split(shares: Tensor, protected: Sequence[int]) -> list[int]:
        kept = torch.cat([torch.zeros(len(shares), 1), shares.cumsum(dim=1)], dim=1)
        free = 1 - torch.arange(WIDTH + 1) / WIDTH
        counts: list[int] = ((experience + 1) * (1 - kept) - alpha * free).argmin(dim=1).tolist()
        return counts

    running = torch.stack([moments(seed) for seed in range(experience + 1)]).mean(dim=0)
    memory = GPM(LAYERS, WIDTH)
    memory.update(running, split)
    for moment, count in zip(running.numpy(), memory.dims, strict=True):
        energies = np.sort(np.linalg.eigvalsh(moment))[::-1]
        costs = [
            (experience + 1) * (1 - energies[:k].sum() / energies.sum()) - alpha * (WIDTH - k) / WIDTH
            for k in range(WIDTH + 1)
        ]
        assert count == int(np.argmin(costs))
    assert largest(protected(memory) @ running - running @ protected(memory)) < 1e-12


def test_at_most_limits_a_rule_and_warns_about_each_basis_that_it_limits() -> None:
    memory = GPM(2, WIDTH)
    with pytest.warns(UserWarning) as caught:
        memory.update(moments(0)[:2], at_most(3, lambda shares, protected: [5, 3]))
    assert [str(one.message) for one in caught] == [
        "Basis 0 needs 5 new directions to hold enough energy, and only 3 are known: keep more of them, or "
        "lower the threshold."
    ]
    assert memory.dims == [3, 3]


def test_a_rule_that_forgets_a_basis_is_refused() -> None:
    with pytest.raises(ValueError):
        GPM(LAYERS, WIDTH).update(moments(0), lambda shares, protected: [1])


def test_a_memory_can_start_from_the_principal_directions_of_weights() -> None:
    weights = normal(LAYERS, 24, WIDTH)
    memory = GPM(LAYERS, WIDTH)
    memory.update(weights.mT @ weights, reaching(0.85))
    for layer in range(LAYERS):
        expected = projector(principal_subspace(weights[layer], 0.85))
        assert largest(protected(memory)[layer] - expected) < 1e-12


# What is refused


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_moments_without_energy_or_with_broken_entries_are_refused(bad: float) -> None:
    broken = moments(0)
    broken[1] = bad
    memory = GPM(LAYERS, WIDTH)
    with pytest.raises(ValueError, match="Matrix 1 has no energy, or entries that are not finite: measure"):
        memory.update(broken, reaching(0.9))
    assert memory.dims == [0] * LAYERS


@pytest.mark.parametrize("shape", [(WIDTH, WIDTH), (2, WIDTH, WIDTH), (LAYERS, WIDTH + 1, WIDTH + 1)])
def test_moments_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    memory = GPM(LAYERS, WIDTH)
    with pytest.raises(
        ValueError, match="do not fit a memory of 3 bases of width 16: stack one matrix of 16"
    ):
        memory.update(torch.ones(shape), reaching(0.9))
