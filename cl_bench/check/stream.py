"""A stream of generated images that records which of them were read."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.data.experience import Experience
from cl_bench.data.sources import ArraySource, Sources
from cl_bench.data.stream import Transform
from cl_bench.data.views import floats

CLASSES_PER_EXPERIENCE = 2
IMAGES_PER_CLASS = 6
TEST_IMAGES_PER_CLASS = 3

_TILE = 4  # pixels, one patch

Pictures = npt.NDArray[np.float64]


class WatchedSource(ArraySource):
    """A source that records which images were read.

    Attributes:
        read: Indices of the images read since the set was last cleared.
    """

    def __init__(self, images: Tensor, targets: list[int]) -> None:
        super().__init__(images, targets)
        self.read: set[int] = set()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return image ``index`` (3, H, W) with its label, and record the read."""
        self.read.add(index)
        return super().__getitem__(index)


class TinyStream(StreamDataModule):
    """Slopes of one colour a class, without noise: the inputs of every layer span few directions.

    A memory that only grows therefore has room for many experiences, although the transformer is small. No
    two images are equal and training augments none, so an image is recognised by its pixels. Unless a batch
    size is given, the training images of an experience fit into one batch.

    Args:
        num_experiences: Number of experiences.
        classes_per_experience: Number of classes of each.
        images_per_class: Number of training images of each class.
        separable: Whether a class is a pattern of its own in place of a colour, which a method can learn in
            few steps.
        image_size: Height and width of the images, in pixels; a multiple of 4.
        batch_size: Images in a batch of training.
        kwargs: As in every dataset.
    """

    name = "tiny"
    decoding = "generated, uint8 RGB"

    def __init__(
        self,
        *,
        num_experiences: int = 4,
        classes_per_experience: int = CLASSES_PER_EXPERIENCE,
        images_per_class: int = IMAGES_PER_CLASS,
        separable: bool = False,
        image_size: int = 8,
        batch_size: int = CLASSES_PER_EXPERIENCE * IMAGES_PER_CLASS,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_experiences=num_experiences, image_size=image_size, batch_size=batch_size, **kwargs
        )
        self.num_classes = classes_per_experience * num_experiences
        pictures = self._patterns() if separable else self._slopes()
        self.train = _of_brightness(pictures, np.linspace(0.6, 1, images_per_class))
        self.test = _of_brightness(pictures, np.linspace(0.63, 0.97, TEST_IMAGES_PER_CLASS))

    def sources(self) -> Sources:
        """Return the generated images."""
        return Sources(self.train, self.test, [f"slope {label}" for label in range(self.num_classes)])

    def train_transform(self) -> Transform:
        """Change nothing."""
        return self.test_transform()

    def test_transform(self) -> Transform:
        """Change nothing."""
        return floats()

    def probe(self) -> tuple[Tensor, Tensor]:
        """Return all test images (N, 3, H, W) and their labels (N,)."""
        return self.test_transform()(self.test.images), torch.tensor(self.test.targets)

    def training_images(self, experience: Experience) -> set[int]:
        """Return the indices of the training images of ``experience``."""
        return {index for index, label in enumerate(self.train.targets) if label in experience.classes}

    def _slopes(self) -> Pictures:
        """Return a slope of one colour for each class."""
        colours = np.random.RandomState(0).uniform(0.3, 1, (self.num_classes, 3, 1, 1))
        slope = np.linspace(0.5, 1, self.image_size)
        return colours * np.broadcast_to(slope, (3, len(slope), len(slope)))

    def _patterns(self) -> Pictures:
        """Return a picture for each class that repeats random pixels of its own."""
        tiles = np.random.RandomState(0).uniform(0, 1, (self.num_classes, 3, _TILE, _TILE))
        times = self.image_size // _TILE
        return np.tile(tiles, (1, 1, times, times))


def _of_brightness(pictures: Pictures, brightness: Pictures) -> WatchedSource:
    """Return every picture of a class (C, 3, H, W) in [0, 1] in each brightness (N,)."""
    images = pictures[:, None] * brightness[:, None, None, None]
    pixels = np.rint(255 * images.reshape(-1, *pictures.shape[1:])).astype(np.uint8)
    labels = np.repeat(np.arange(len(pictures)), len(brightness))
    return WatchedSource(torch.from_numpy(pixels), labels.tolist())
