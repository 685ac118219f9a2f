"""Subspaces of a layer's inputs: their bases, and what lies outside them.

A basis is a matrix ``V`` (d, k) with orthonormal columns. A second moment is uncentred, ``S = X^T X / N``
for inputs ``X`` (N, d): a unit vector ``u`` holds the energy ``u^T S u``, and the trace is the energy of all.
Only shares of the energy count, so the scale of a moment is arbitrary, and so is the sign of a direction.

Decisions are made in float64; results have the type of the input. Mixed precision does not reach the
projections: bfloat16 would leave thousandths of what they remove.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Energy = Literal["features", "covariance"]
"""What defines the share of a direction: the eigenvalues of ``S``, or those of ``S S``.

The first are squared singular values of the inputs, as in the papers. The second are squared singular values
of ``S`` itself, which the released code of InfLoRA decomposes; far fewer directions then meet a threshold.
"""


_ROUNDING = 1e-12  # the share of the energy below which eigenvalues in float64 are rounding


_JITTER = 1e-12  # of the mean eigenvalue, to begin with


def residual(x: Tensor, basis: Tensor) -> Tensor:
    """Remove from the columns of ``x`` (…, d, n) what lies in the span of ``basis`` (…, d, k).

    The projector (d, d) is never formed. Source: GPM, https://arxiv.org/abs/2103.09762, equation 8.

    >>> e0 = torch.tensor([[1.0], [0.0]])
    >>> residual(torch.tensor([[3.0], [4.0]]), e0).flatten()
    tensor([0., 4.])
    """
    with torch.autocast(x.device.type, enabled=False):
        return x - basis @ (basis.mT @ x)


def right_residual(x: Tensor, basis: Tensor) -> Tensor:
    """Remove from the rows of ``x`` (…, m, d) what lies in the span of ``basis`` (…, d, k).

    This form is for weights (m, d), down-projections (r, d) and their gradients: the result maps the span
    to zero. Source: GPM, https://arxiv.org/abs/2103.09762, equation 6.

    >>> e0 = torch.tensor([[1.0], [0.0]])
    >>> right_residual(torch.tensor([[3.0, 4.0], [5.0, 6.0]]), e0)
    tensor([[0., 4.],
            [0., 6.]])
    """
    with torch.autocast(x.device.type, enabled=False):
        return x - (x @ basis) @ basis.mT


def complement(basis: Tensor) -> Tensor:
    """Return an orthonormal basis (d, d - k) of everything orthogonal to ``basis`` (d, k).

    >>> complement(torch.tensor([[1.0], [0.0], [0.0]])).abs()
    tensor([[0., 0.],
            [1., 0.],
            [0., 1.]])
    """
    everything: Tensor = torch.linalg.qr(basis, mode="complete").Q
    return everything[:, basis.shape[1] :].clone()


def leading_directions(moments: Tensor, rank: int) -> Tensor:
    """Return the ``rank`` strongest eigenvectors (…, d, rank) of moments (…, d, d), strongest first.

    Raises:
        ValueError: If the rank is not between 1 and d.

    >>> leading_directions(torch.diag(torch.tensor([1.0, 3.0, 2.0])), rank=2).abs()
    tensor([[0., 0.],
            [1., 0.],
            [0., 1.]])
    """
    require_rank(rank, moments.shape[-1])
    return spectrum(moments.double())[1][..., :rank].to(moments.dtype, copy=True)


def generalised_directions(new: Tensor, old: Tensor, rank: int) -> Tensor:
    """Return orthonormal directions (…, d, rank) with much energy in ``new`` for little in ``old``.

    They span the strongest solutions of ``S_new u = λ S_old u``. With the factor ``L L^T = S_old`` these are
    ``u = L^-T v`` for the strongest eigenvectors ``v`` of ``L^-1 S_new L^-T``. Each has the largest ratio of
    the two energies among all vectors conjugate to those before it, which does not make the ratio of the two
    traces over the span the largest.

    The diagonal of ``old`` is raised by 1e-12 of its mean, and by ten times as much until there is a factor.
    A direction in which no input has energy, as a normalisation layer may leave, would otherwise have a ratio
    of rounding errors, often the largest. Moments in float32 are too coarse to avoid that.

    Source: the isolated directions of LoDA, https://arxiv.org/abs/2603.00191. The released code raises the
    diagonal only where the factorisation fails, and by absolute numbers, which depend on the scale.

    Args:
        new: Second moments (…, d, d) of the experience at hand, best in float64.
        old: Second moments (…, d, d) of the experiences before, best in float64.
        rank: Number of directions.

    Raises:
        ValueError: If the rank is not between 1 and d, or ``old`` is not a second moment of inputs.

    >>> new, old = torch.diag(torch.tensor([4.0, 3.0, 1.0])), torch.diag(torch.tensor([8.0, 1.0, 1.0]))
    >>> generalised_directions(new, old, rank=1).abs().flatten()
    tensor([0., 1., 0.])
    """
    require_rank(rank, new.shape[-1])
    factor = _cholesky_factor(old.double())
    half = torch.linalg.solve_triangular(factor, new.double(), upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    strongest = spectrum(whitened)[1][..., :rank]
    solutions = torch.linalg.solve_triangular(factor.mT, strongest, upper=True)
    directions: Tensor = torch.linalg.qr(solutions).Q
    return directions.to(new.dtype)


def directions_needed(shares: Tensor, threshold: float) -> Tensor:
    """Return how few of the strongest directions it takes to hold ``threshold`` of the energy, (…), integers.

    Args:
        shares: Each direction's share of the energy (…, d), strongest first, float64. They may sum to less
            than one: the missing share counts as held already.
        threshold: Share of the energy to hold, in [0, 1].

    Raises:
        ValueError: If the threshold is not between 0 and 1.

    >>> directions_needed(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 0.8)
    tensor(2)
    >>> directions_needed(torch.tensor([0.1, 0.05, 0.0], dtype=torch.float64), 0.8)  # 0.85 is held already
    tensor(0)
    """
    if not 0 <= threshold <= 1:
        raise ValueError(
            f"An energy threshold of {threshold} is not a share of the energy: choose one from 0 to 1."
        )
    # Summed from the weak end, so that small sums keep their digits.
    left = shares.flip(-1).cumsum(-1).flip(-1)  # the share that is missing before each direction is taken
    left = left.clamp(max=1)  # rounding may make some shares negative
    return (left > 1 - threshold + _ROUNDING).sum(-1)


def energy_threshold(index: int, num_experiences: int, start: float, end: float = 1.0) -> float:
    """Return the energy threshold of experience ``index``: linear from ``start``, ending before ``end``.

    Source: the released code of InfLoRA, https://arxiv.org/abs/2404.00228.

    Args:
        index: Index of the experience, from 0.
        num_experiences: Number of experiences in the stream.
        start: Threshold of the first experience, in [0, 1].
        end: Threshold that an experience after the last would have, in [0, 1].

    Raises:
        ValueError: If there is no such experience.

    >>> [round(energy_threshold(index, 10, start=0.98), 3) for index in (0, 1, 9)]
    [0.98, 0.982, 0.998]
    """
    if not 0 <= index < num_experiences:
        raise ValueError(
            f"There is no experience {index} in a stream of {num_experiences}: "
            f"choose one from 0 to {num_experiences - 1}."
        )
    return start + (end - start) * index / num_experiences


def principal_subspace(weight: Tensor, threshold: float) -> Tensor:
    """Return the input directions (n, p) that hold ``threshold`` of the energy of ``weight`` (m, n).

    They are the first right singular vectors, as few as hold that share of the squared singular values.

    Source: KeepLoRA, https://arxiv.org/abs/2601.19659, whose weight is the transpose of PyTorch's; its
    released code passes the other side, and so takes output directions.

    Args:
        weight: Weight of a linear layer.
        threshold: Share of the energy, in [0, 1].

    Raises:
        ValueError: If the threshold is not between 0 and 1, or the weight is zero or not finite.

    >>> principal_subspace(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]), threshold=0.8).abs().flatten()
    tensor([0., 1., 0.])
    """
    wide = weight.double()
    shares, directions = spectrum(of_unit_energy(wide.mT @ wide, "features"))
    return directions[:, : int(directions_needed(shares, threshold))].to(weight.dtype, copy=True)


def spectrum(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (…, d), none below zero, and eigenvectors (…, d, d), strongest first."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(-1).clamp(min=0), vectors.flip(-1)


def of_unit_energy(moments: Tensor, energy: Energy) -> Tensor:
    """Return second moments (…, d, d), squared for the energy of the covariance, with trace one, float64."""
    wide = moments.double()
    trace = wide.diagonal(dim1=-2, dim2=-1).sum(-1)
    sound = (trace > 0) & wide.isfinite().all(-1).all(-1)
    if not bool(sound.all()):
        first = int((~sound).flatten().nonzero()[0])
        raise ValueError(
            f"Matrix {first} has no energy, or entries that are not finite: "
            "measure it on inputs that are finite and not all zero."
        )
    wide = wide / trace[..., None, None]
    return of_unit_energy(wide @ wide, "features") if energy == "covariance" else wide


def _cholesky_factor(moments: Tensor) -> Tensor:
    """Return ``L`` (…, d, d), lower triangular: ``L L^T`` are the moments with a raised diagonal."""
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    if not bool((mean > 0).all() & moments.isfinite().all()):
        raise ValueError(
            "The older second moment is zero or not finite: compute isolated directions after an experience."
        )
    identity = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    jitter = _JITTER * mean
    while bool((jitter < mean).all()):
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(moments + jitter[..., None, None] * identity)
        if not bool(failed.any()):
            return factor
        jitter = jitter.where(failed == 0, 10 * jitter)
    raise ValueError(
        "The older second moment has a large negative eigenvalue: give X^T X / N of some inputs X."
    )


def require_rank(rank: int, width: int) -> None:
    """Refuse a rank that is not between 1 and ``width``."""
    if not 1 <= rank <= width:
        raise ValueError(
            f"No {rank} directions of {width} dimensions can be orthonormal: choose a rank from 1 to {width}."
        )
