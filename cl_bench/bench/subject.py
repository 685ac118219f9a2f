"""A strategy in one experience of a stream of noise: Lightning takes the steps that a bench asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from torch.utils.benchmark import timer
from torch.utils.data import DataLoader

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.contracts.low_rank import memory_of
from cl_bench.data.experience import Batch, Experience
from cl_bench.data.sources import PixelSource, Sources
from cl_bench.data.stream import Stream, Transform
from cl_bench.data.views import preset
from cl_bench.loop.checkpoint import FOLDER_NAME, Checkpoints
from cl_bench.maths.memory import GPM
from cl_bench.run.configs import CONFIGS, Config, config_file, load
from cl_bench.run.configuration import resolve

RECIPES = CONFIGS / "recipes" / "imagenet_r"
"""The published settings that a bench measures with."""

CLASSES = 2
"""Classes of an experience."""

_LENGTH = 20  # experiences of the stream
_STORED = 256 / 224  # height of an image in the cache, over that of a view
_ENDLESS = 10**9  # batches; without a length, Lightning fetches each batch before the step on the one before
_EVALUATED = 4  # batches of an evaluation
_CHECKPOINTS = 4  # of an experience: one before each of its phases, as its only epoch adds none
_PROTECTED = 0.75  # share of the directions that a memory holds after the last experience


class NoiseStream(StreamDataModule):
    """Images of noise, without a download and without Avalanche, of all old classes at once and of two more.

    Data passes and evaluation see batches that are in memory already.

    Args:
        number: Number of the last experience, from 2.
        kwargs: As in every dataset.

    Attributes:
        steps: The batches of the last experience.
        device: Where the batches are.
        pass_seconds: How long the data passes of the current experience took in all.
        entered: When it began, in seconds.
    """

    name = "noise"
    decoding = "generated, uint8 RGB"
    steps: Iterator[Batch]
    device = torch.device("cpu")

    def __init__(self, *, number: int, **kwargs: Any) -> None:
        super().__init__(num_experiences=2, **kwargs)
        self.number = number

    def batch(self, size: int) -> Batch:
        """Return ``size`` images with labels of the current experience, the same for the same size."""
        generator = torch.Generator().manual_seed(size)
        images = torch.rand(size, 3, self.image_size, self.image_size, generator=generator)
        classes = self.experience.classes
        labels = classes.start + torch.arange(size) % len(classes)
        return images.to(self.device), labels.to(self.device)

    def sources(self) -> Sources:
        """Generate a batch of the last experience, in the size in which a cache stores images."""
        size, number, classes = round(_STORED * self.image_size), self.batch_size, CLASSES * self.number
        pixels = np.random.RandomState(0).randint(256, size=(number, size, size, 3), dtype=np.uint8)
        images = PixelSource(pixels, [classes - 1 - index % CLASSES for index in range(number)])
        return Sources(images, images, [f"noise {label}" for label in range(classes)])

    def train_transform(self) -> Transform:
        """Return the random crops of InfLoRA's code and its relatives."""
        return preset("inflora", self.image_size, whole=False).train

    def test_transform(self) -> Transform:
        """Return their transform at test time."""
        return preset("inflora", self.image_size, whole=False).test

    @property
    def test_images(self) -> list[int]:
        """As many of each class, in four batches or one image of each."""
        classes = len(self.class_names)
        return [max(1, _EVALUATED * self.batch_size // classes)] * classes

    def enter(self, experience: Experience) -> None:
        """Serve ``experience`` from now on."""
        super().enter(experience)
        images, _ = self.batch(self.batch_size)
        places = torch.arange(max(self.batch_size, experience.num_classes), device=self.device)
        labels = experience.classes.start + places % experience.num_classes
        self._at_hand = images[places % self.batch_size], labels  # of every class, from as many images
        self.pass_seconds, self.entered = 0.0, timer()

    def train_dataloader(self) -> Any:
        """Serve one batch in the first experience, and the steps in the last."""
        return _Batches(iter([self._at_hand]) if self.experience.is_first else self.steps)

    def loading(self) -> DataLoader[Batch]:
        """Serve one batch of training as a run does: cropped, resized and stacked."""
        return super().train_dataloader()

    def augmented_dataloader(self, pass_index: int) -> Any:
        """Serve one batch."""
        return self.plain_dataloader()

    def plain_dataloader(self) -> Any:
        """Serve one batch, and time what is done with it."""
        began = timer()
        yield self._at_hand
        self.pass_seconds += timer() - began

    def test_dataloader(self) -> Any:
        """Serve the test images of the classes seen."""
        images, labels = self._at_hand[0], torch.arange(self.experience.num_classes_seen, device=self.device)
        parts = labels.repeat(self.test_images[0]).split(self.batch_size)
        return _Batches((images[: len(part)], part) for part in parts)

    def _dealt_stream(self, sources: Sources) -> Stream:
        old, order = range(len(sources.class_names) - CLASSES), tuple(range(len(sources.class_names)))
        last = range(len(old), len(order))
        experiences = Experience(0, _LENGTH, old), Experience(1, _LENGTH, last)
        return Stream(experiences, train_indices=(), test_indices=(), order=order, benchmark=None)


class _Batches:
    """A loader of batches; Lightning is done with each before it asks for the next."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return _ENDLESS

    def __iter__(self) -> Iterator[Batch]:
        return self._batches


@dataclass(frozen=True)
class Setup:
    """What a bench measures with.

    Attributes:
        backbone: Arguments of the backbone.
        image_size: Height and width of its images.
        device: Where to measure.
        precisions: As the Trainer names them.
        batches: Numbers of images, smallest first.
        rounds: How often each call is timed.
        folder: Where curves, checkpoints and results are written.
    """

    backbone: Config
    image_size: int
    device: torch.device
    precisions: Sequence[str]
    batches: Sequence[int]
    rounds: int
    folder: Path


class Subject:
    """A strategy, set as its recipe for ImageNet-R sets it, in a run up to one experience of a stream of 20.

    The older experiences are one batch with all of their classes, and a method with a memory has random
    directions in it, three quarters of all by the end of the stream.

    Args:
        stem: Config of the strategy.
        number: Number of the experience, from 2: it decides what is old, and not where schedules stand.
        precision: As the Trainer names it.
        setup: What to measure with.

    Raises:
        ValueError: If there is no such config.
    """

    def __init__(self, stem: str, number: int, precision: str, setup: Setup) -> None:
        torch.compiler.reset()  # the compiled code of other strategies counts towards torch's limit
        recipe = RECIPES / f"{stem}.yaml"
        published: Config = {"model": load(recipe)["model"]} if recipe.exists() else {}
        accelerator = "gpu" if setup.device.type == "cuda" else "cpu"
        stream = {"number": number, "image_size": setup.image_size, "batch_size": setup.batches[-1]}
        given: Config = {
            "backbone": setup.backbone,
            "trainer": {"max_epochs": 1, "precision": precision, "accelerator": accelerator},
            "data": {"class_path": f"{__name__}.NoiseStream", "init_args": stream},
        }
        configuration = resolve(
            [config_file("strategies", stem), published, given], ["--model.scheduler=null"]
        )
        remembering = LambdaCallback(on_fit_start=lambda trainer, strategy: self._remember())
        curves = CSVLogger(setup.folder, name=stem)
        self.strategy, self.trainer = configuration.build([remembering], [curves])
        assert isinstance(configuration.datamodule, NoiseStream)
        self.stream = configuration.datamodule
        self.stream.device = self.trainer.strategy.root_device
        self._folder = setup.folder

    def run(self, steps: Iterator[Batch]) -> dict[str, float]:
        """Run from end to end; Lightning takes a step, with all hooks, on each of ``steps`` before the next.

        Returns:
            Seconds of the last experience: its data ``passes``; the other ``work`` of the hooks around
            training; ``evaluation``; one ``checkpoint``; and ``overhead``, the checkpoints with all else but
            passes, work, evaluation and training.
        """
        self.stream.steps = steps
        checkpoints = Checkpoints(self._folder / FOLDER_NAME, cell="bench")
        result = self.trainer.run(self.strategy, self.stream, folder=self._folder, checkpoints=checkpoints)
        whole, spent = timer() - self.stream.entered, result.costs[-1].seconds
        passes = self.stream.pass_seconds
        return {
            "passes": passes,
            "work": spent["data_passes"] - passes,
            "evaluation": spent["evaluation"],
            "checkpoint": spent["checkpoints"] / _CHECKPOINTS,
            "overhead": whole - spent["data_passes"] - spent["evaluation"] - spent["training"],
        }

    def _remember(self) -> None:
        memory = memory_of(self.strategy)
        if memory is not None and not self.strategy.experience.is_first:
            fill(memory, _PROTECTED * (self.stream.number - 1) / (_LENGTH - 1))


def fill(memory: GPM, share: float) -> None:
    """Protect random directions until ``memory`` holds ``share`` of all."""
    generator = torch.Generator().manual_seed(0)
    wanted = round(share * memory.dim)
    for number in range(memory.num_bases):
        projection = memory.first_with(number)
        basis = memory.basis(projection).double()
        drawn = torch.randn(memory.dim, max(wanted - basis.shape[1], 0), generator=generator).to(basis)
        new = torch.linalg.qr(drawn - basis @ (basis.mT @ drawn)).Q
        memory.replace(projection, torch.cat([basis, new], dim=1))
