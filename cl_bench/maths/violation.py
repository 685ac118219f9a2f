"""How far an update of a weight moves the outputs for inputs of the past."""

from __future__ import annotations

import torch
from torch import Tensor


def null_space_violation(update: Tensor, second_moment: Tensor, num_tokens: int) -> Tensor:
    """Return how far ``update`` (…, m, n) moves the outputs for past inputs, ‖update · inputsᵀ‖_F, (…).

    The inputs (N, n) come as their second moment. In float32 rounding leaves about 3e-4 of the norm that the
    same update would have in unprotected directions; give float64 to see below.

    Source: the violation score of JANUS-LoRA, https://arxiv.org/abs/2605.28495.

    Args:
        update: Change of a weight.
        second_moment: Uncentred second moment of the inputs, inputsᵀ inputs / N, (…, n, n).
        num_tokens: Number ``N`` of input vectors.

    >>> inputs = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    >>> null_space_violation(torch.tensor([[2.0, 5.0]]), inputs.T @ inputs / 2, num_tokens=2) ** 2
    tensor(20.)
    """
    squared = num_tokens * ((update @ second_moment) * update).sum(dim=(-2, -1))
    return squared.clamp(min=0).sqrt()  # rounding can push a square that is zero below it


def scale_free_violation(update: Tensor, second_moment: Tensor) -> Tensor:
    """Return the violation of ``update`` (…, m, n) as a share of the most that it could be, in [0, 1], (…).

    It is ‖update · inputsᵀ‖_F / (‖update‖_F ‖inputs‖_F), so neither the size of the update, nor that of the
    inputs, nor their number counts; 0 for no update. An update in a random direction has about 1/√n.

    Args:
        update: Change of a weight.
        second_moment: Uncentred second moment of the inputs, (…, n, n).

    >>> inputs = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    >>> scale_free_violation(torch.tensor([[3.0, 4.0]]), inputs.T @ inputs)
    tensor(0.6000)
    """
    violation = null_space_violation(update, second_moment, num_tokens=1)
    energy = second_moment.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    most = torch.linalg.matrix_norm(update) * energy.clamp(min=0).sqrt()
    share: Tensor = violation / most.where(most > 0, 1)
    return share


def relative_violation(update: Tensor, basis: Tensor) -> Tensor:
    """Return the part of ``update`` (…, m, n) that acts on the span of ``basis`` (…, n, k), in [0, 1], (…).

    It is ‖update · basis‖_F / ‖update‖_F, and 0 for no update.

    >>> relative_violation(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
    tensor(0.6000)
    """
    violation: Tensor = torch.linalg.matrix_norm(update @ basis)
    length: Tensor = torch.linalg.matrix_norm(update)
    return violation / length.where(length > 0, 1)
