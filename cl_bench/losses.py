"""Losses as pure functions of logits or features and labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# Cross-entropy passes over one value of the target, -100 unless told otherwise, and a class that lies 100
# positions before the current ones is shifted to just that. No class is shifted to this value.
_NEVER = -(2**62)


def local_cross_entropy(logits: Tensor, labels: Tensor, first_class: int) -> Tensor:
    """Return the mean cross-entropy of logits (B, C) over the C classes of one experience, for labels (B,).

    Classes of other experiences take no part in the softmax. The value is that of a cross-entropy over all
    classes seen in which every older logit is minus infinity, so older heads get no gradient.

    Source: the loss of InfLoRA and its relatives, https://arxiv.org/abs/2404.00228.

    Args:
        logits: One column for each class of the experience.
        labels: Positions in the class order, from ``first_class`` to ``first_class + C - 1``.
        first_class: Position of the first column.

    >>> import torch
    >>> logits = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    >>> local_cross_entropy(logits, torch.tensor([10, 11]), first_class=10)
    tensor(0.6931)
    """
    return F.cross_entropy(logits, labels - first_class, ignore_index=_NEVER)
