"""Invented glyphs of a few strokes each, drawn in many ways.

A glyph is a set of curves, as if of an unknown script. Its drawings differ in weight, contrast, slant, tilt,
size, place, colours, light and noise, and its strokes wobble. No font and no character has a part in it.

Source: https://doi.org/10.1126/science.aab3050 for characters as programs of strokes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from pretraining.drawing import grid, integers, uniform

STROKES = 4
"""Largest number of strokes in a glyph."""

_POINTS = 24  # that are drawn along a stroke


@dataclass(frozen=True)
class Glyphs:
    """A batch of N glyphs.

    Attributes:
        strokes: Control points (N, STROKES, 4, 2) of cubic Bézier curves: x to the right and y down, with the
            glyph in [-1, 1].
        present: Whether the glyph has the stroke (N, STROKES).
    """

    strokes: Tensor
    present: Tensor

    def __len__(self) -> int:
        """Return the number of glyphs."""
        return len(self.strokes)

    def __getitem__(self, index: Tensor | slice) -> Glyphs:
        """Return the glyphs at ``index``."""
        return Glyphs(self.strokes[index], self.present[index])


def random_glyphs(number: int, generator: Generator) -> Glyphs:
    """Draw glyphs of two to four strokes: lines, arcs and S-shapes between places of a loose grid."""
    shape = (number, STROKES)
    start, end = _places(shape, generator), _places(shape, generator)
    joined = uniform(0, 1, shape, generator) < 0.55  # to an end of the stroke before
    at_start = uniform(0, 1, (number, STROKES, 1), generator) < 0.5
    for stroke in range(1, STROKES):
        before = torch.where(at_start[:, stroke], start[:, stroke - 1], end[:, stroke - 1])
        start[:, stroke] = torch.where(joined[:, stroke, None], before, start[:, stroke])
    end = torch.where((end - start).norm(dim=2, keepdim=True) < 0.5, -start, end)
    along = end - start
    across = torch.stack([-along[..., 1], along[..., 0]], dim=-1)
    kind = uniform(0, 1, (number, STROKES, 1), generator)
    side = torch.where(uniform(0, 1, (number, STROKES, 1), generator) < 0.5, -1.0, 1.0)
    bend = torch.where(kind < 0.45, 0.0, side * uniform(0.2, 0.9, (number, STROKES, 1), generator))
    first = start + along / 4 + bend * across
    second = end - along / 4 + torch.where(kind > 0.9, -bend, bend) * across
    strokes = torch.stack([start, first, second, end], dim=2)
    count = 2 + integers(STROKES - 1, (number, 1), generator)
    present = torch.arange(STROKES, device=generator.device) < count
    return Glyphs(_fitted(strokes, present), present)


def drawings(glyphs: Glyphs, size: int, generator: Generator) -> Tensor:
    """Draw each glyph once (N, 3, size, size), uint8, on the device of ``generator``."""
    number = len(glyphs)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return uniform(low, high, (number, *shape), generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn((number, *shape), generator=generator, device=generator.device)

    def whether(share: float, *shape: int) -> Tensor:
        return between(0, 1, *shape) < share

    wobbling = glyphs.strokes + 0.05 * between(0, 1, 1, 1, 1) * normal(STROKES, 4, 2)
    curves = _curves(wobbling) @ _linear_maps(number, generator)[:, None] + between(-0.22, 0.22, 1, 1, 2)
    steps = curves.diff(dim=2)
    angles = torch.atan2(steps[..., 1], steps[..., 0])
    angles = torch.cat([angles, angles[..., -1:]], dim=2)
    # As a broad nib draws: the weight of a stroke depends on its direction, in half of the drawings.
    contrast = between(0, 0.6, 1, 1) * whether(0.5, 1, 1)
    thinned = contrast * (1 + torch.cos(2 * (angles - between(-0.4, 0.4, 1, 1)))) / 2
    radii = (between(0.045, 0.17, 1, 1) * (1 - thinned)).clamp(min=0.035)
    coverage = _coverage(curves, radii, glyphs.present, 2 / size * between(0.5, 1.2, 1, 1), size)[:, None]

    dark = whether(0.7, 1, 1, 1)
    ground = torch.where(dark, between(0.35, 1, 3, 1, 1), between(0, 0.65, 3, 1, 1))
    distance = between(0.2, 0.6, 3, 1, 1)
    ink = torch.where(dark, ground - distance, ground + distance)
    rows, columns = grid(size, generator.device)
    across, down, both = (between(-most, most, 3, 1, 1) for most in (0.2, 0.2, 0.15))
    lit = ground + across * columns + down * rows + both * rows * columns
    noise = between(0, 0.09, 1, 1, 1) * normal(1, size, size)
    return (255 * (torch.lerp(lit, ink, coverage) + noise).clamp(0, 1)).round().to(torch.uint8)


def _places(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw points (*shape, 2) near those of a grid of three columns and four rows."""
    column, row = (integers(end, shape, generator) for end in (3, 4))
    places = torch.stack([0.62 * (column - 1), 0.6 * row - 0.9], dim=-1)
    return places + uniform(-0.12, 0.12, (*shape, 2), generator)


def _fitted(strokes: Tensor, present: Tensor) -> Tensor:
    """Move and scale strokes so that the box of those that are present is [-1, 1] in its longer direction.

    A small glyph is enlarged by 2.5 at most.
    """
    absent = ~present[:, :, None, None]
    lowest = strokes.masked_fill(absent, math.inf).amin(dim=(1, 2), keepdim=True)
    highest = strokes.masked_fill(absent, -math.inf).amax(dim=(1, 2), keepdim=True)
    half = (highest - lowest).amax(dim=3, keepdim=True) / 2
    return (strokes - (lowest + highest) / 2) / half.clamp(min=0.4)


def _curves(strokes: Tensor) -> Tensor:
    """Return points (N, STROKES, P, 2) along the Bézier curves with control points (N, STROKES, 4, 2)."""
    t = torch.linspace(0, 1, _POINTS, device=strokes.device)[:, None]
    weights = torch.cat([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], dim=1)
    return weights @ strokes


def _linear_maps(number: int, generator: Generator) -> Tensor:
    """Draw matrices (number, 2, 2) that scale, slant and tilt points in rows."""
    tilt, slant, width, stretch = (
        uniform(low, high, (number,), generator)
        for low, high in ((-0.12, 0.12), (-0.3, 0.3), (0.5, 0.8), (0.8, 1.25))
    )
    height = width * stretch
    x_to = torch.stack([width * tilt.cos(), height * tilt.sin()], dim=-1)
    y_to = torch.stack([width * (slant - tilt.sin()), height * tilt.cos()], dim=-1)
    return torch.stack([x_to, y_to], dim=1)


def _coverage(curves: Tensor, radii: Tensor, present: Tensor, softness: Tensor, size: int) -> Tensor:
    """Return how far discs along curves cover each pixel (N, size, size), in [0, 1].

    Args:
        curves: Centres of discs (N, STROKES, P, 2).
        radii: Radius of each disc (N, STROKES, P).
        present: Strokes to draw (N, STROKES).
        softness: Width of an edge, that broadcasts with (N, 1, 1).
        size: Height and width of the images, which show [-1, 1].
    """
    centres = curves.flatten(1, 2)
    radii = radii.masked_fill(~present[:, :, None], -math.inf).flatten(1)
    line = (2 * torch.arange(size, device=curves.device) + 1) / size - 1
    columns, rows = ((line - centres[..., axis, None]).square() for axis in (0, 1))
    depth = curves.new_full((len(curves), size, size), -math.inf)
    for disc in range(centres.shape[1]):
        distance = (rows[:, disc, :, None] + columns[:, disc, None, :]).sqrt_()
        torch.maximum(depth, radii[:, disc, None, None] - distance, out=depth)
    return (depth / softness + 0.5).clamp(0, 1)
