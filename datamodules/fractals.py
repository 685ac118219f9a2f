"""Generated fractals, with any number of classes, images, pixels and experiences."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.data.attractors import attractors, placed, random_systems, seeded, varied
from cl_bench.data.sources import Sources
from cl_bench.data.stream import Transform

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
        transform: Transform = v2.Compose([shift, v2.ToDtype(torch.float32, scale=True)])
        return transform

    def test_transform(self) -> Transform:
        """Change nothing."""
        transform: Transform = v2.Compose([v2.ToDtype(torch.float32, scale=True)])
        return transform


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
