"""Random iterated function systems in the plane, and pictures of their attractors.

A system consists of a few affine contractions. The chaos game moves a point by one of them at random, again
and again, and so fills the set that the contractions together map onto itself: the attractor, a fractal. A
class of generated images is one system, and each of its images a small variation of it.

Source: FractalDB, https://arxiv.org/abs/2101.08515; the singular values of the maps, and in particular their
sum, are drawn as in https://arxiv.org/abs/2110.03091, which avoids most degenerate shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

_BURN_IN = 12  # steps that take a walker practically onto the attractor
_LARGEST = 0.95  # singular value: a map that hardly contracts slows the game down
_RETRIES = 64


@dataclass(frozen=True)
class Systems:
    """A batch of systems of N maps each, ``x -> A x + b``.

    Attributes:
        matrices: The ``A`` (B, N, 2, 2).
        offsets: The ``b`` (B, N, 2).
        hues: Colour coordinate of each map (B, N), in [0, 1].
    """

    matrices: Tensor
    offsets: Tensor
    hues: Tensor

    def __len__(self) -> int:
        """Return the number of systems."""
        return len(self.matrices)

    def __getitem__(self, index: Tensor | slice) -> Systems:
        """Return the systems at ``index``."""
        return Systems(self.matrices[index], self.offsets[index], self.hues[index])

    @property
    def reflections(self) -> Tensor:
        """Number of maps of each system that mirror a picture (B,)."""
        mirrors: Tensor = torch.linalg.det(self.matrices) < 0
        return mirrors.sum(dim=1)


def seeded(*entropy: int, device: torch.device | str = "cpu") -> Generator:
    """Return a generator that is seeded by all of ``entropy``."""
    (state,) = np.random.SeedSequence(entropy).generate_state(1, np.uint64).tolist()
    return torch.Generator(device).manual_seed(state >> 1)


def random_systems(number: int, maps: int, *, mirrored: bool, generator: Generator) -> Systems:
    """Draw systems of ``maps`` maps; the number of maps that mirror is odd if ``mirrored``, else even."""
    device = generator.device
    values = _singular_values(number, maps, generator)
    angles = 2 * math.pi * torch.rand(2, number, maps, generator=generator, device=device)
    signs = torch.randint(2, (number, maps), generator=generator, device=device) * 2.0 - 1
    # The sign of the last map sets the parity of the reflections.
    signs[:, -1] *= torch.prod(signs, dim=1) * (-1.0 if mirrored else 1.0)
    diagonal = torch.stack([values[..., 0], values[..., 1] * signs], dim=-1)
    matrices = _rotations(angles[0]) @ torch.diag_embed(diagonal) @ _rotations(angles[1])
    offsets = 2 * torch.rand(number, maps, 2, generator=generator, device=device) - 1
    hues = torch.rand(number, maps, generator=generator, device=device)
    return Systems(matrices, offsets, hues)


def varied(systems: Systems, strength: float, generator: Generator) -> Systems:
    """Return ``systems`` with every map randomly scaled, turned and moved by up to about ``strength``.

    The determinants keep their signs, so the number of reflections does not change.
    """

    def noise(*shape: int) -> Tensor:
        return strength * (2 * torch.rand(shape, generator=generator, device=generator.device) - 1)

    number, maps = systems.hues.shape
    scaled = systems.matrices * (1 + noise(number, maps, 1, 1)).clamp(max=1.0)
    return Systems(
        _rotations(noise(number, maps)) @ scaled,
        systems.offsets + noise(number, maps, 2),
        systems.hues,
    )


def attractors(systems: Systems, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Play the chaos game with one point for each pixel, and count points on a grid that the attractor fills.

    Args:
        systems: B systems.
        size: Height and width of the grid.
        generator: Generator of the moves, on the device of the systems.

    Returns:
        Coverage of each pixel (B, size, size), in [0, 1], and its mean colour coordinate (B, size, size).
    """
    points, hues = _orbit(systems, 2 * size, max(size // 2, 1), generator)
    lowest, highest = points.amin(dim=1, keepdim=True), points.amax(dim=1, keepdim=True)
    extent = (highest - lowest).amax(dim=2, keepdim=True).clamp(min=1e-6)
    centred = (points - (lowest + highest) / 2) / extent + 0.5
    cells = (centred * (size - 1)).round().long().clamp(0, size - 1)
    places = cells[..., 1] * size + cells[..., 0]
    counts = torch.zeros(len(systems), size * size, device=points.device)
    colour = torch.zeros_like(counts)
    counts.scatter_add_(1, places, torch.ones_like(hues))
    colour.scatter_add_(1, places, hues)
    coverage = counts.log1p() / counts.amax(dim=1, keepdim=True).log1p()
    shape = (len(systems), size, size)
    return coverage.sqrt().view(shape), (colour / counts.clamp(min=1)).view(shape)


def placed(
    coverage: Tensor, hue: Tensor, octaves: tuple[float, float], reach: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Return attractors at random scales and positions: coverage and hue, (B, 1, size, size) each.

    Args:
        coverage: Coverage of each pixel (B, size, size).
        hue: Colour coordinate of each pixel (B, size, size).
        octaves: Smallest and largest reduction, as a power of two; a negative number enlarges.
        reach: Farthest move, in halves of the reduced image.
        generator: Generator of scales and positions.
    """
    number, device = len(coverage), coverage.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, device=device)

    zoom, shift = 2 ** uniform(*octaves, number), uniform(-reach, reach, number, 2)
    sampled = torch.zeros(number, 2, 3, device=device)
    sampled[:, 0, 0], sampled[:, 1, 1], sampled[:, :, 2] = zoom, zoom, shift
    both = torch.stack([coverage, hue], dim=1)
    grid = F.affine_grid(sampled, list(both.shape), align_corners=False)
    moved = F.grid_sample(both, grid, align_corners=False)
    return moved[:, :1], moved[:, 1:]


def _orbit(systems: Systems, walkers: int, steps: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return points on each attractor (B, P, 2), P = walkers · steps, and their colour coordinates (B, P)."""
    number, device = len(systems), systems.matrices.device
    # A map is chosen in proportion to the area that it covers, so that the points spread evenly.
    weights = torch.linalg.det(systems.matrices).abs().clamp(min=0.02)
    edges = (weights.cumsum(1) / weights.sum(1, keepdim=True))[:, :-1].contiguous()
    draws = torch.rand(number, (_BURN_IN + steps) * walkers, generator=generator, device=device)
    choices = torch.searchsorted(edges, draws).view(number, _BURN_IN + steps, walkers)
    affine = torch.cat([systems.matrices.flatten(2), systems.offsets, systems.hues[..., None]], dim=2)
    taken = torch.gather(
        affine[:, None].expand(-1, choices.shape[1], -1, -1), 2, choices[..., None].expand(-1, -1, -1, 7)
    )
    x, y, hue = torch.zeros(3, number, walkers, device=device)
    kept = []
    for step in range(_BURN_IN + steps):
        a, b, c, d, e, f, g = taken[:, step].unbind(-1)
        x, y, hue = a * x + b * y + e, c * x + d * y + f, (hue + g) / 2
        if step >= _BURN_IN:
            kept.append(torch.stack([x, y, hue], dim=-1))
    orbit = torch.cat(kept, dim=1)
    return orbit[..., :2], orbit[..., 2]


def _singular_values(number: int, maps: int, generator: Generator) -> Tensor:
    """Draw singular values (number, maps, 2), larger first, all below one."""
    device = generator.device
    found = torch.empty(0, maps, 2, device=device)
    for _ in range(_RETRIES):
        values = torch.rand(2 * number + 8, maps, 2, generator=generator, device=device)
        values = values.sort(dim=-1, descending=True).values
        aim = (5 + maps + torch.rand(len(values), generator=generator, device=device)) / 2
        total = (values[..., 0] + 2 * values[..., 1]).sum(dim=1)
        values = values * (aim / total)[:, None, None]
        found = torch.cat([found, values[values.amax(dim=(1, 2)) < _LARGEST]])
        if len(found) >= number:
            return found[:number]
    raise RuntimeError(f"{_RETRIES} draws gave fewer than {number} systems of {maps} maps.")


def _rotations(angles: Tensor) -> Tensor:
    """Return the rotation (..., 2, 2) by each of ``angles`` (...), in radians."""
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
