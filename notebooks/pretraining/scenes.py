"""Scenes from formulas: fractals and shapes that occlude one another, textured, coloured and lit.

Photographs have edges where one object occludes another, textures whose power falls with frequency, and
colours that vary less than brightness. A scene has them as well: leaves of random shape and texture, one of
them a fractal, fall on a textured ground and are lit from one side.

Source: dead leaves, https://doi.org/10.1023/A:1011118430228 and https://arxiv.org/abs/2106.05963, with
formula-driven classes as in https://arxiv.org/abs/2101.08515.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from datamodules.fractals import attractors, placed, random_systems
from pretraining.drawing import grid, integers, uniform

_TEXTURES = 3  # in a scene, shared by its leaves


def random_scenes(number: int, size: int, leaves: int, generator: Generator) -> Tensor:
    """Draw scenes (number, 3, size, size), uint8.

    Args:
        number: Number of scenes.
        size: Height and width in pixels.
        leaves: Number of shapes on the ground of each scene, the last one a fractal.
        generator: Generator on the device that draws.
    """
    textures = torch.stack([_texture(number, size, generator) for _ in range(_TEXTURES)], dim=1)
    colours = _palette(number, leaves + 1, generator)
    canvas = (colours[:, 0, :, None, None] + textures[:, 0]).clamp(0, 1)
    rows = torch.arange(number, device=generator.device)
    for leaf in range(1, leaves + 1):
        alpha, hue = _fractal(number, size, generator) if leaf == leaves else _blob(number, size, generator)
        chosen = integers(_TEXTURES, (number,), generator)
        shift = integers(size, (2,), generator).tolist()
        texture = textures[rows, chosen].roll(shift, dims=(2, 3))
        tint = colours[:, leaf, :, None, None] + hue * (colours[:, leaf - 1, :, None, None] - 0.5)
        canvas = torch.lerp(canvas, (tint + texture).clamp(0, 1), alpha)
    lit = canvas * _light(number, size, generator)
    return (255 * _blurred(lit, generator).clamp(0, 1)).round().to(torch.uint8)


def _texture(number: int, size: int, generator: Generator) -> Tensor:
    """Draw noise (number, 3, size, size) of mean zero: clouds or grains, stretched or not."""
    device = generator.device
    shape = (number, 1, 1, 1)
    rows = torch.fft.fftfreq(size, device=device)[:, None]
    columns = torch.fft.rfftfreq(size, device=device)[None, :]
    angle = uniform(0, math.pi, shape, generator)
    stretch = 2 ** uniform(-2.5, 2.5, shape, generator)
    along, across = columns * angle.cos() + rows * angle.sin(), rows * angle.cos() - columns * angle.sin()
    frequency = (along**2 * stretch + across**2 / stretch + (0.5 / size) ** 2).sqrt()
    # A band of frequencies makes stripes and grains; all frequencies, falling in power, make clouds.
    centre = 2 ** uniform(-4.5, -1.5, shape, generator)
    band = _unit_power(torch.exp(-((frequency.log2() - centre.log2()) ** 2) / 0.3))
    grained = (uniform(0, 1, shape, generator) < 0.5).float()
    falling = _unit_power(frequency ** -uniform(0.8, 2.2, shape, generator))
    white = torch.randn(number, 3, size, size, generator=generator, device=device)
    # The channels are mostly equal.
    colourful = uniform(0, 0.4, shape, generator)
    mixed = white[:, :1] + colourful * white[:, 1:2] * uniform(-1, 1, (number, 3, 1, 1), generator)
    spectrum = torch.fft.rfft2(mixed) * torch.lerp(falling, band, grained)
    noise = torch.fft.irfft2(spectrum, s=(size, size))
    contrast = uniform(0.0, 0.22, shape, generator)
    texture: Tensor = contrast * noise / noise.std(dim=(1, 2, 3), keepdim=True)
    return texture


def _unit_power(amplitudes: Tensor) -> Tensor:
    return amplitudes / amplitudes.square().sum((2, 3), keepdim=True).sqrt()


def _palette(number: int, colours: int, generator: Generator) -> Tensor:
    """Draw colours (number, colours, 3) in [0, 1] that are similar within a scene."""
    base = uniform(0.1, 0.9, (number, 1, 1), generator)
    value = base + uniform(0.05, 0.45, (number, 1, 1), generator) * torch.randn(
        number, colours, 1, generator=generator, device=generator.device
    )
    tint = 0.08 * torch.randn(number, 1, 3, generator=generator, device=generator.device)
    own = 0.10 * torch.randn(number, colours, 3, generator=generator, device=generator.device)
    return (value + tint + own).clamp(0.02, 0.98)


def _blob(number: int, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw the coverage (number, 1, size, size) of a shape in each scene, and its change of hue."""
    rows, columns = grid(size, generator.device)
    shape = (number, 1, 1, 1)
    y, x = rows - uniform(-1.1, 1.1, shape, generator), columns - uniform(-1.1, 1.1, shape, generator)
    angle = uniform(0, 2 * math.pi, shape, generator)
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    # A power law of the radius: few large leaves and many small ones.
    radius = 0.14 * uniform(0.02, 1, shape, generator) ** -0.5
    aspect = 2 ** uniform(-1.5, 1.5, shape, generator)
    u, v = along * aspect.sqrt(), across / aspect.sqrt()
    corners = uniform(0, 1, shape, generator) < 0.4
    round_ = (u**2 + v**2).sqrt()
    square = torch.maximum(u.abs(), v.abs())
    bend = uniform(-0.5, 0.5, shape, generator) * torch.sin(
        uniform(2, 7, shape, generator) * torch.atan2(v, u)
    )
    distance = torch.where(corners, square, round_ * (1 + bend * (uniform(0, 1, shape, generator) < 0.5)))
    softness = uniform(0.01, 0.06, shape, generator)
    hue = uniform(-0.6, 0.6, shape, generator) * (along / radius.clamp(min=0.2)).clamp(-1, 1)
    return ((radius - distance) / softness + 0.5).clamp(0, 1), hue


def _fractal(number: int, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw the coverage (number, 1, size, size) of a fractal in each scene, and its change of hue."""
    maps = 2 + int(integers(4, (1,), generator))
    systems = random_systems(number, maps, mirrored=False, generator=generator)
    coverage, hue = placed(*attractors(systems, size, generator), (-0.7, 1.3), 0.6, generator)
    solid = uniform(1, 4, (number, 1, 1, 1), generator)
    return (solid * coverage).clamp(0, 1), hue - 0.5


def _light(number: int, size: int, generator: Generator) -> Tensor:
    """Draw light (number, 3, size, size) that changes linearly over the scene."""
    rows, columns = grid(size, generator.device)
    shape = (number, 1, 1, 1)
    fall, drift = uniform(-0.35, 0.35, shape, generator), uniform(-0.35, 0.35, shape, generator)
    strength, colour = uniform(0.7, 1.25, shape, generator), uniform(0.9, 1.1, (number, 3, 1, 1), generator)
    return strength * colour * (1 + (fall * rows + drift * columns))


def _blurred(images: Tensor, generator: Generator) -> Tensor:
    """Mix each image with its blurred version, in a random ratio."""
    smooth = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    return torch.lerp(images, smooth, uniform(0, 1, (len(images), 1, 1, 1), generator))
