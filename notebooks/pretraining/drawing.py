"""What scenes and glyphs are drawn with."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def uniform(low: float, high: float, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw numbers (*shape,) in [low, high), on the device of ``generator``."""
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def integers(end: int, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw integers (*shape,) from 0 to ``end - 1``, on the device of ``generator``."""
    return torch.randint(end, shape, generator=generator, device=generator.device)


def grid(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return row and column of each pixel in [-1, 1], (size, 1) and (1, size)."""
    line = torch.linspace(-1, 1, size, device=device)
    return line[:, None], line[None, :]
