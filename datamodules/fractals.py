"""Generated fractals, with any number of classes, images, pixels and experiences."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torchvision.transforms import v2

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.data.sources import Sources
from cl_bench.data.stream import Transform
from cl_bench.data.views import floats

_RENDERING = 1  # to be increased when a change of the code changes a picture
_BLOCK = 32  # images that are rendered together
_CACHED = 512  # blocks in memory
_MAPS = (2, 3, 4)
_OCTAVES, _REACH = (-0.2, 0.5), 0.2  # differences in size and place within a class
_TRAIN, _TEST = range(2)


class Fractals(StreamDataModule):
    """Images of fractals: each class is an iterated function system with two colours, its images variations.

    An image depends only on ``data_seed``, its class and its number, so a dataset with more classes or more
    images contains the smaller one. An image is rendered when it is first read. An odd number of the maps of
    a system mirrors; in the systems that the embedded backbone was pre-trained on, an even number does, so
    the two share no class. Training shifts an image by up to an eighth of its width.

    Source: FractalDB, https://arxiv.org/abs/2101.08515.

    Args:
        num_classes: Number of classes.
        images_per_class: Training images of each class.
        test_images_per_class: Test images of each class.
        variation: How far the maps of an image may deviate from those of its class.
        data_seed: Seed of the classes; each seed is another dataset.
        num_experiences: Number of equal experiences, T; null if num_classes_per_experience is given.
        image_size: Height and width of the images, in pixels.
        kwargs: As in every dataset.
    """

    name = "fractals"
    decoding = "generated, uint8 RGB"

    def __init__(
        self,
        *,
        num_classes: int = 50,
        images_per_class: int = 100,
        test_images_per_class: int = 20,
        variation: float = 0.05,
        data_seed: int = 0,
        num_experiences: int | None = 10,
        image_size: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experiences=num_experiences, image_size=image_size, **kwargs)
        self.num_classes = num_classes
        self.images_per_class = images_per_class
        self.test_images_per_class = test_images_per_class
        self.variation = variation
        self.data_seed = data_seed

    def sources(self) -> Sources:
        """Describe the images; each is rendered when it is read."""
        for name in ("num_classes", "images_per_class", "test_images_per_class"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)} and must be at least 1: choose a larger one."
                )

        def rendered(split: int, images: int) -> Rendered:
            return Rendered(
                Pictures(self.image_size, self.variation, self.data_seed, split), self.num_classes, images
            )

        return Sources(
            train=rendered(_TRAIN, self.images_per_class),
            test=rendered(_TEST, self.test_images_per_class),
            class_names=[f"fractal {label}" for label in range(self.num_classes)],
        )

    def train_transform(self) -> Transform:
        """Shift at random; the border is repeated."""
        shift = v2.RandomCrop(self.image_size, padding=self.image_size // 8, padding_mode="edge")
        return floats(shift)

    def test_transform(self) -> Transform:
        """Change nothing."""
        return floats()


@dataclass(frozen=True)
class Pictures:
    """The settings that the images of a split depend on.

    Attributes:
        size: Height and width in pixels.
        variation: How far the maps of an image may deviate from those of its class.
        data_seed: Seed of the classes.
        split: Index of the split: 0 for training, 1 for testing.
    """

    size: int
    variation: float
    data_seed: int
    split: int

    def block(self, label: int, block: int) -> Tensor:
        """Render the images (32, 3, size, size), uint8, of a class from number ``32 * block`` on."""
        of_class = seeded(self.data_seed, label)
        maps = _MAPS[label % len(_MAPS)]
        system = random_systems(1, maps, mirrored=True, generator=of_class)
        colours = torch.rand(2, 3, 1, 1, generator=of_class)
        generator = seeded(self.data_seed, label, 1 + self.split, block)
        systems = varied(system[torch.zeros(_BLOCK, dtype=torch.int64)], self.variation, generator)
        coverage, hue = placed(*attractors(systems, self.size, generator), _OCTAVES, _REACH, generator)
        ground = torch.rand(_BLOCK, 3, 1, 1, generator=generator)
        ink = torch.lerp(colours[0], colours[1], hue)
        light = 0.6 + 0.6 * torch.rand(_BLOCK, 1, 1, 1, generator=generator)
        pixels = torch.lerp(ground, ink, coverage) * light
        return (255 * pixels.clamp(0, 1)).round().to(torch.uint8)


class Rendered:
    """A source that renders a block of images when one of them is read, and caches the latest blocks.

    Args:
        pictures: Settings of the images.
        num_classes: Number of classes.
        images_per_class: Number of images of each class.
    """

    def __init__(self, pictures: Pictures, num_classes: int, images_per_class: int) -> None:
        self.pictures = pictures
        self.images_per_class = images_per_class
        self.targets: list[int] = np.repeat(np.arange(num_classes), images_per_class).tolist()

    @property
    def fingerprint(self) -> str:
        """Sha256 of everything that the images depend on."""
        settings = asdict(self.pictures) | {
            "rendering": _RENDERING,
            "targets": [len(self), self.images_per_class],
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return image ``index`` (3, H, W), uint8, with its class."""
        label, number = divmod(index, self.images_per_class)
        block, place = divmod(number, _BLOCK)
        return _block(self.pictures, label, block)[place], label


@lru_cache(maxsize=_CACHED)
def _block(pictures: Pictures, label: int, block: int) -> Tensor:
    return pictures.block(label, block)


# The pictures

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
