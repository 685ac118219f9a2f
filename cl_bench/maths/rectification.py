"""Closed forms that turn a safe update of a weight into updates of its two low-rank factors.

Moving the factors of ``W + s B A`` by ``X`` (r, n) and ``Y`` (m, r) moves the weight, to first order, by the
composite ``s (B X + Y A)``. It should move by the safe gradient ``G_s = G (I - V Vᵀ)``: the gradient of the
whole weight without the input directions ``V`` (n, k) that older experiences use. Projecting only the
gradient of ``A`` does not achieve that: the step of ``B`` acts through the rows of ``A`` as they are.
Rectification finds the updates of both factors whose composite is nearest to the safe gradient. The
composites that two factors can reach form the tangent space of the matrices of rank r at ``B A``, so the
nearest one is the orthogonal projection of the safe gradient on that space,

    Π(G_s) = P_B G_s + (I - P_B) G_s P_A,

with ``P_B`` (m, m) and ``P_A`` (n, n) the projectors on the columns of ``B`` and on the rows of ``A``.

Source: Gradient Rectification in JANUS-LoRA, https://arxiv.org/abs/2605.28495. The idea is the paper's: a
closed form takes the safe update, through the tangent space, to corrected updates of both factors. The
paper's formula was not at hand and no code of it is public, so the one here is a reconstruction, derived from
the normal equations of min ‖s (B X + Y A) - G_s‖. Written in the gradients of the factors it has the shape
that LoRA-Pro, https://arxiv.org/abs/2407.18242, found for ``G`` itself. We also derived the gauges as shares
of one overlap, the damping, and what a strategy can rely on:

* ``Π(G_s) V = (I - P_B) G_s P_A V`` is left in the protected directions. It vanishes when ``A V = 0``, and
  then ``X V = 0`` as well, whatever the damping: a down-projection without protected directions gains none by
  a step along ``X``, and the weight changes in none, terms of second order included.
* That survives sums of steps, as SGD with momentum takes them. Adam scales each entry separately and breaks
  it: the rows of ``A`` then have to be projected again after every step.
* When ``A V = 0`` or nothing is protected, ⟨Π(G_s), G⟩ = ‖Π(G_s)‖², so a small step lowers the loss; damped,
  the product stays positive. Otherwise that is not certain.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Gauge = Literal["a-first", "b-first", "half", "minnorm"]
"""Which factor carries what both could: ``A``, ``B``, each a half, or so that both updates are shortest."""

_SMALLEST = 1e-100  # below the Gram matrix of any factor in float32 but zero; its inverse is still finite


@torch.no_grad()
def rectified(
    A: Tensor,
    B: Tensor,
    gradient_A: Tensor,
    gradient_B: Tensor,
    *,
    scale: float,
    damping: float = 1e-4,
    gauge: Gauge = "half",
) -> tuple[Tensor, Tensor]:
    """Return the updates X (…, r, n) of A and Y (…, m, r) of B whose composite is nearest to a safe gradient.

    The safe gradient ``G_s`` (m, n) itself is never needed, only what it gives the factors: ``s Bᵀ G_s`` and
    ``s G_s Aᵀ``. The first is what :func:`cl_bench.maths.subspace.right_residual` leaves of the gradient of
    ``A``. The second is the gradient of ``B`` itself if ``A V = 0`` or nothing is protected; otherwise it is
    the gradient of a second up-projection, zero, over the down-projection ``A (I - V Vᵀ)``, which
    :class:`~cl_bench.network.shielded.ShieldedLinear` gives.

    With ``B⁺ = (BᵀB)⁻¹Bᵀ``, ``A⁺ = Aᵀ(AAᵀ)⁻¹`` and ``C = B⁺ G_s A⁺ / s`` (r, r), all solutions are

        X = B⁺ G_s / s - D A,    Y = G_s A⁺ / s - B (C - D),

    one for each ``D`` (r, r). The composite contains ``s B C A = P_B G_s P_A``, the overlap that a step of
    either factor can make; ``D`` is the share of it left to ``B``. The gauge chooses ``D``, never the
    composite: 0 for ``a-first``, C for ``b-first``, C/2 for ``half``. For ``minnorm`` it makes
    ‖X‖² + ‖Y‖² least; LoRA-Pro, which asks for the pair nearest to the gradients of the factors, chooses the
    same, because ``gradient_A Aᵀ = Bᵀ gradient_B``.

    The diagonal of each Gram matrix is raised by the share ``damping`` of its mean, so a direction of ``B``
    whose energy is far below that share of the mean energy counts as absent, and the size of ``B`` does not
    matter: the closed form holds as well for the small ``B`` of the first steps as later. At ``B = 0``, where
    every adapter starts, X = 0 and Y = G_s A⁺ / s, as the pseudo-inverse gives. On a stream of 50 classes the
    accuracy with this damping, with a fixed one and with a pseudo-inverse differed by less than two seeds can
    show; configs/grids/README.md has the figures.

    Everything is computed in float64: TF32 would round the Gram matrices more coarsely than the damping.
    Numbers that are not finite stay so, and stop the run as divergence.

    Args:
        A: Down-projections (…, r, n); leading dimensions are layers, all rectified at once.
        B: Up-projections (…, m, r).
        gradient_A: Safe gradients s Bᵀ G_s (…, r, n).
        gradient_B: Safe gradients s G_s Aᵀ (…, m, r).
        scale: Factor ``s`` of the product.
        damping: Added to the diagonals of ``BᵀB`` and ``AAᵀ``, in units of their means, above 0.
        gauge: Which factor carries what both could.

    Returns:
        Replacements of the gradients of ``A`` and ``B``, in their types.

    Raises:
        ValueError: If the damping is not positive.

    >>> A, B = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0]])
    >>> G = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    >>> X, Y = rectified(A, B, B.T @ G, G @ A.T, scale=1.0, damping=1e-9)
    >>> X, Y.T
    (tensor([[2., 3.]]), tensor([[2., 2.]]))
    >>> B @ X + Y @ A  # a rank of one reaches all but the last entry
    tensor([[4., 3.],
            [2., 0.]])
    """
    if not damping > 0:
        raise ValueError(
            f"With a damping of {damping} the Gram matrix of a B with dependent columns is singular: "
            "give a positive one, such as 1e-4."
        )
    down, up = A.double(), B.double()  # autocast does not change float64
    gram_up, gram_down = _damped(up.mT @ up, damping), _damped(down @ down.mT, damping)
    inverse_up, inverse_down = _inverse(gram_up), _inverse(gram_down)
    by_A = inverse_up @ gradient_A.double() / scale**2  # B⁺ G_s / s
    by_B = gradient_B.double() @ inverse_down / scale**2  # G_s A⁺ / s
    overlap = inverse_up @ (up.mT @ by_B)  # C
    left_to_B = _share_of_B(overlap, gram_up, gram_down, gauge)  # D
    X = by_A - left_to_B @ down
    Y = by_B - up @ (overlap - left_to_B)
    return X.to(gradient_A.dtype), Y.to(gradient_B.dtype)


def _damped(gram: Tensor, damping: float) -> Tensor:
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return gram + (damping * size).clamp(min=_SMALLEST) * identity


def _inverse(gram: Tensor) -> Tensor:
    """Return the inverse of each ``gram`` (…, r, r), or NaN if it is not positive definite.

    Solving for the many columns of a gradient takes twice as long in all, and is no closer in float64.
    """
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(gram)  # unlike cholesky, it does not synchronise
    return torch.cholesky_inverse(factor.masked_fill(failed[..., None, None] > 0, torch.nan))


def _share_of_B(overlap: Tensor, gram_up: Tensor, gram_down: Tensor, gauge: Gauge) -> Tensor:
    """Return the part of ``overlap`` (…, r, r) that the gauge leaves to B."""
    match gauge:
        case "a-first":
            return torch.zeros_like(overlap)
        case "b-first":
            return overlap
        case "half":
            return overlap / 2
        case "minnorm":
            return _shortest_share(overlap, gram_up, gram_down)


def _shortest_share(overlap: Tensor, gram_up: Tensor, gram_down: Tensor) -> Tensor:
    """Return the D (…, r, r) that makes ‖X‖² + ‖Y‖² least: ``gram_up D + D gram_down = overlap gram_down``.

    In the eigenbases of the two Gram matrices the equation separates into one for each entry, and the entry
    between eigenvalues λ of B and μ of A is divided in their proportion: μ / (λ + μ) of it goes to B.
    """
    of_B: Tensor
    along_B: Tensor
    # A matrix that is not finite has no eigenvectors; it still reaches the result through the overlap.
    of_B, along_B = torch.linalg.eigh(gram_up.nan_to_num(0, 0, 0))
    of_A, along_A = torch.linalg.eigh(gram_down.nan_to_num(0, 0, 0))
    fraction = of_A[..., None, :] / (of_B[..., :, None] + of_A[..., None, :])
    share: Tensor = along_B @ (fraction * (along_B.mT @ overlap @ along_A)) @ along_A.mT
    return share
