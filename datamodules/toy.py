"""Generated pictures for tests: dealing and training take milliseconds."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms import v2

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.data.sources import ArraySource, Sources
from cl_bench.data.stream import Transform
from cl_bench.data.views import floats

Array = npt.NDArray[np.float64]


class Toy(StreamDataModule):
    """Pictures of Gaussian spots under noise; every class has a place, a width and a colour of its own.

    Training shifts a picture by up to one pixel.

    Args:
        num_classes: Number of classes.
        images_per_class: Training images of each class.
        test_images_per_class: Test images of each class.
        noise: Standard deviation of the noise, in units of white.
        data_seed: Seed of the classes and the noise; each seed is another dataset.
        image_size: Height and width of the images, in pixels.
        batch_size: Images in a batch of training.
        kwargs: As in every dataset.
    """

    name = "toy"
    decoding = "generated, uint8 RGB"

    def __init__(
        self,
        *,
        num_classes: int = 6,
        images_per_class: int = 12,
        test_images_per_class: int = 6,
        noise: float = 0.1,
        data_seed: int = 0,
        image_size: int = 16,
        batch_size: int = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size=image_size, batch_size=batch_size, **kwargs)
        self.num_classes = num_classes
        self.images_per_class = images_per_class
        self.test_images_per_class = test_images_per_class
        self.noise = noise
        self.data_seed = data_seed

    def sources(self) -> Sources:
        """Generate the pictures."""
        generator = np.random.RandomState(self.data_seed)
        patterns = self._patterns(generator)
        return Sources(
            train=self._noisy(patterns, self.images_per_class, generator),
            test=self._noisy(patterns, self.test_images_per_class, generator),
            class_names=[f"spot {label}" for label in range(self.num_classes)],
        )

    def train_transform(self) -> Transform:
        """Shift by up to one pixel."""
        shift = v2.RandomCrop(self.image_size, padding=1)
        return floats(shift)

    def test_transform(self) -> Transform:
        """Change nothing."""
        return floats()

    def _patterns(self, generator: np.random.RandomState) -> Array:
        """Return one picture per class (C, 3, H, W) in [0, 1]."""
        shape = (self.num_classes, 1, 1, 1)
        rows, columns = np.mgrid[: self.image_size, : self.image_size] / self.image_size
        row, column = generator.uniform(0.2, 0.8, (2, *shape))
        width = generator.uniform(0.1, 0.3, shape)
        colour = generator.uniform(0, 1, (self.num_classes, 3, 1, 1))
        spot: Array = colour * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * width**2))
        return spot

    def _noisy(self, patterns: Array, number: int, generator: np.random.RandomState) -> ArraySource:
        """Return ``number`` noisy pictures of each class."""
        labels = np.repeat(np.arange(self.num_classes), number)
        pictures = patterns[labels]
        noisy = pictures + self.noise * generator.standard_normal(pictures.shape)
        pixels = np.rint(255 * noisy.clip(0, 1)).astype(np.uint8)
        return ArraySource(torch.from_numpy(pixels), labels.tolist())
