"""Integers computed from all bits of a tensor, which detect a change without a copy."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 2**20  # numbers whose fingerprints are taken together


def fingerprints(tensor: Tensor) -> Tensor:
    """Return an integer for each row of ``tensor`` (n, …) that depends on all bits of the row, (n,) in int64.

    The bits are weighted with odd random numbers, the same in every process: a row that changed in one place
    never keeps its integer, and a row that changed in several places keeps it with a chance below 2⁻³¹.

    >>> one, other = fingerprints(torch.tensor([[1.0, 2.0], [3.0, 4.0]])), fingerprints(torch.ones(2, 2))
    >>> (one == other).any(), one.shape
    (tensor(False), torch.Size([2]))
    """
    rows = tensor.detach().contiguous().reshape(len(tensor), -1)
    bits = rows if rows.dtype == torch.bool else rows.view(_INTEGERS[rows.element_size()])
    generator = torch.Generator().manual_seed(bits.shape[1])
    weights = (torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator) * 2 + 1).to(bits.device)
    parts = bits.split(max(1, _AT_ONCE // max(1, bits.shape[1])))
    return torch.cat([(part.long() * weights).sum(dim=1) for part in parts])


def fingerprint(tensor: Tensor) -> Tensor:
    """Return one integer for a whole ``tensor`` of any shape, () in int64; see :func:`fingerprints`."""
    return fingerprints(tensor.reshape(1, -1))[0]
