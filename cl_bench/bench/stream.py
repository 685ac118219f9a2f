"""A stream of noise: nothing is downloaded, and Avalanche never sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import timer
from torch.utils.data import DataLoader

from cl_bench.bench.handover import Handover
from cl_bench.contracts.datamodule import Batch, StreamDataModule
from cl_bench.data.experience import Experience
from cl_bench.data.sources import PixelSource, Sources
from cl_bench.data.stream import Stream, Transform
from cl_bench.data.views import Preset, preset

_STORED = 256 / 224  # height of an image as a cache keeps it, over that of a view


class NoiseStream(StreamDataModule):
    """Images of noise in equal experiences.

    A training gets its batches through :attr:`handover`, and every pass over the images serves the
    batches :attr:`at_hand`, so that neither waits for images.

    Args:
        num_experiences: Number of experiences.
        classes: Classes of each.
        kwargs: As in every dataset.

    Attributes:
        handover: The batches of training.
        at_hand: The batches of a pass.
        pass_seconds: How long each data pass took, since the list was cleared.
    """

    name = "noise"
    decoding = "generated, uint8 RGB"

    def __init__(self, *, num_experiences: int = 20, classes: int = 2, **kwargs: Any) -> None:
        super().__init__(num_experiences=num_experiences, **kwargs)
        self.classes = classes
        self.handover = Handover()
        self.at_hand: list[Batch] = []
        self.pass_seconds: list[float] = []

    def batch(self, size: int, experience: Experience, device: torch.device) -> Batch:
        """Return ``size`` images with labels of ``experience``, on the device, the same for the same size."""
        generator = torch.Generator().manual_seed(size)
        images = torch.rand(size, 3, self.image_size, self.image_size, generator=generator)
        classes = experience.classes
        labels = classes.start + torch.arange(size) % len(classes)
        return images.to(device), labels.to(device)

    def sources(self) -> Sources:
        """Generate as many images as a batch has, of the size that a cache keeps them in."""
        size = round(_STORED * self.image_size)
        pixels = np.random.RandomState(0).randint(256, size=(self.batch_size, size, size, 3), dtype=np.uint8)
        names = [f"noise {label}" for label in range(self.classes * (self.num_experiences or 1))]
        images = PixelSource(pixels, [index % self.classes for index in range(self.batch_size)])
        return Sources(images, images, names)

    def train_transform(self) -> Transform:
        """Return the random crops that InfLoRA's code and its relatives train on."""
        return self._preset.train

    def test_transform(self) -> Transform:
        """Return what they test on."""
        return self._preset.test

    def train_dataloader(self) -> Any:
        """Serve what is handed over."""
        return self.handover

    def loading(self) -> DataLoader[Batch]:
        """Serve one batch of training as a run does: cropped, resized and put together."""
        return super().train_dataloader()

    def augmented_dataloader(self, pass_index: int) -> Any:
        """Serve the batches at hand."""
        return self._timed()

    def plain_dataloader(self) -> Any:
        """Serve the batches at hand."""
        return self._timed()

    def test_dataloader(self) -> Any:
        """Serve the batches at hand."""
        return _loader(self.at_hand)

    def _timed(self) -> Iterator[Batch]:
        began = timer()
        yield from self.at_hand
        self.pass_seconds.append(timer() - began)

    def _dealt_stream(self, sources: Sources) -> Stream:
        sizes = range(0, self.classes * (self.num_experiences or 1), self.classes)
        return Stream(
            experiences=tuple(
                Experience(index, len(sizes), range(first, first + self.classes))
                for index, first in enumerate(sizes)
            ),
            train_indices=(),
            test_indices=(),
            order=tuple(range(self.classes * len(sizes))),
            benchmark=None,
        )

    @property
    def _preset(self) -> Preset:
        return preset("inflora", self.image_size, whole=False)


class ShortStream(NoiseStream):
    """One batch an epoch, a pass and an evaluation, for a run that goes from end to end by itself.

    Attributes:
        entered: When the experience at hand began, in seconds.
    """

    entered: float

    @property
    def test_images(self) -> list[int]:
        """As many of each class as all classes together need for a batch."""
        classes = len(self.class_names)
        return [-(-self.batch_size // classes)] * classes

    def enter(self, experience: Experience) -> None:
        """Have the batch of ``experience`` at hand."""
        super().enter(experience)
        self.entered = timer()
        self.at_hand = [self.batch(self.batch_size, experience, torch.device("cpu"))]

    def train_dataloader(self) -> Any:
        """Serve the batch at hand."""
        return _loader(self.at_hand)

    def test_dataloader(self) -> Any:
        """Serve the test images of the classes seen, in one batch."""
        labels = torch.arange(self.experience.num_classes_seen).repeat(self.test_images[0])
        images, _ = self.batch(len(labels), self.experience, torch.device("cpu"))
        return _loader([(images, labels)])


def _loader(batches: list[Batch]) -> DataLoader[Batch]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
