"""The contract of a dataset: its images and transforms, and how its stream is served."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from cl_bench.data.draws import DrawnImages, DrawSampler
from cl_bench.data.experience import Batch, Experience
from cl_bench.data.loading import RankBatches, StreamLoader, WorkerPool, copied
from cl_bench.data.sources import Indices, Sources, for_validation, of_classes
from cl_bench.data.stream import (
    Stream,
    Transform,
    class_order,
    deal,
    experience_sizes,
    order_name,
    require_one_division,
)
from cl_bench.data.views import View, scaled
from cl_bench.processes.ranks import place

_HELD_OUT_IMAGES = 32  # of each held-out class and split, at most
_MOST_WORKERS = 256
_TRAINING, _TEST, _PLAIN, _AUGMENTED, _HELD_OUT = range(5)  # kinds of passes, whose draws differ


class StreamDataModule(LightningDataModule, ABC):
    """A dataset dealt into a stream of experiences, of which it serves one at a time.

    A dataset is a subclass with a ``name`` that implements :meth:`sources`, :meth:`train_transform` and
    :meth:`test_transform`. Its transforms must draw only from torch's generator. What a loader yields is
    then a function of the seed, the experience, the pass over it, the epoch and the image, for any number of
    workers, and loading leaves torch's and NumPy's global generators as they were.

    Args:
        num_experiences: Number of equal experiences, T; null if num_classes_per_experience is given.
        num_classes_per_experience: Size of equal experiences, or a list with the size of each.
        order: Class order: identity, numpy:SEED, python:SEED, or a list of labels.
        seed: Seed of the order of the images and of their augmentation, at least 0.
        image_size: Height and width of the images, in pixels.
        batch_size: Images in a training batch, summed over all processes of a run.
        test_batch_size: Images in a batch without gradients, summed over all processes of a run; twice
            batch_size if null.
        num_workers: Processes that load images; they change the speed, never a batch. They live as long as
            the stream is served, and each process of a run has its own.
        held_out_classes: Number of classes to leave out of the stream, the last ones by original label; the
            diagnostics measure on them what the backbone still knows outside the stream.
        val_fraction: Share of each class's training images to hold out and evaluate on, to choose settings
            without opening a test image; 0 for a result.
        val_seed: Seed of the choice of these images, shared by all seeds and class orders.
        first_experiences: Number of experiences to serve, to choose settings by the first ones; null for all.
    """

    name: str
    """Name of the dataset in paths and tables."""

    decoding: str = "uint8 RGB"
    """How stored images become pixels; part of the protocol."""

    blank_test_batches: int = 0
    """Number of first test batches whose images (B, 0) are not loaded."""

    def __init__(
        self,
        *,
        num_experiences: int | None = None,
        num_classes_per_experience: int | list[int] | None = None,
        order: str | list[int] = "identity",
        seed: int = 0,
        image_size: int = 224,
        batch_size: int = 64,
        test_batch_size: int | None = None,
        num_workers: int = 0,
        held_out_classes: int = 0,
        val_fraction: float = 0.0,
        val_seed: int = 0,
        first_experiences: int | None = None,
    ) -> None:
        super().__init__()
        self.num_experiences = num_experiences
        self.num_classes_per_experience = num_classes_per_experience
        self.order = order
        self.seed = seed
        self.image_size = image_size
        self.batch_size = batch_size
        self.test_batch_size = 2 * batch_size if test_batch_size is None else test_batch_size
        self.num_workers = num_workers
        self.held_out_classes = held_out_classes
        self.val_fraction = val_fraction
        self.val_seed = val_seed
        self.first_experiences = first_experiences
        self._served: _Served | None = None
        self._pool: WorkerPool | None = None
        self._experience: Experience | None = None

    # To implement

    @abstractmethod
    def sources(self) -> Sources:
        """Find the images and their labels.

        Raises:
            FileNotFoundError: If the data are missing.
            ValueError: If the data cannot be used.
        """

    @abstractmethod
    def train_transform(self) -> Transform:
        """Return the transform from a decoded image to a float tensor (3, H, W) in [0, 1], augmented."""

    @abstractmethod
    def test_transform(self) -> Transform:
        """Return the transform from a decoded image to a float tensor (3, H, W) in [0, 1], deterministic."""

    # The stream

    def setup(self, stage: str = "fit") -> None:
        """Check the arguments and deal the stream; a second call changes nothing.

        Args:
            stage: Lightning's name of the stage; all stages need the same.

        Raises:
            ValueError: If an argument or the data cannot be used.
            FileNotFoundError: If the data are missing.
        """
        if self._served is None:
            self._require_valid_arguments()
            self._served = self._deal()

    @property
    def stream(self) -> Stream:
        """The dealt stream."""
        return self._dealt.stream

    @property
    def experiences(self) -> tuple[Experience, ...]:
        """The experiences that are served, in the order of training."""
        return self.stream.experiences

    @property
    def class_names(self) -> list[str]:
        """Name of the class at each position."""
        return [self._opened.class_names[label] for label in self.stream.order[: self.stream.num_classes]]

    @property
    def evaluated_on(self) -> str:
        """``test``, or ``validation`` if held-out training images are used instead of the test images."""
        return "validation" if self.val_fraction else "test"

    @property
    def test_images(self) -> list[int]:
        """Number of images to evaluate on, for the class at each position."""
        return [int(n) for n in np.bincount(self._dealt.test.positions)[: self.stream.num_classes]]

    @property
    def domains(self) -> list[str]:
        """Names of the domains that the images come from; empty if the dataset has none."""
        return list(self._opened.domains)

    @property
    def domain_images(self) -> list[list[int]]:
        """Number of images to evaluate on, for each domain and the class at each position."""
        test = self._dealt.test
        counts = np.zeros((len(self.domains), len(self.stream.order)), dtype=np.int64)
        if self.domains:
            np.add.at(counts, (test.domains, test.positions), 1)
        return [list(map(int, row[: self.stream.num_classes])) for row in counts]

    @property
    def variants(self) -> dict[str, str]:
        """The published meaning of the dataset that is used: choices such as ``split``, by name."""
        return {}

    @property
    def images_sha256(self) -> str | None:
        """Hash over all image files as ``cl-bench prepare`` scanned them, for the provenance.

        None if they were not scanned, or if the hashes in the protocol are of pixels already.
        """
        return None

    @property
    def order_name(self) -> str:
        """Short name of the class order, as in paths."""
        return order_name(self.order)

    @property
    def stream_length(self) -> int:
        """Number of experiences; the data are read only if the arguments do not determine it."""
        require_one_division(self.num_experiences, self.num_classes_per_experience)
        if (number := self.first_experiences or self.num_experiences) is not None:
            return number
        if isinstance(self.num_classes_per_experience, list):
            return len(self.num_classes_per_experience)
        return len(self._sizes())

    def protocol(self) -> dict[str, object]:
        """Return the part of the protocol that two comparable results on this dataset share.

        Raises:
            ValueError: If the text of a transform does not identify it.
        """
        dealt = self._dealt
        return {
            "dataset": self.name,
            "variants": self.variants,
            "train_images": dealt.train.source.fingerprint,
            "test_images": dealt.test.source.fingerprint,
            "evaluated_on": self.evaluated_on,
            "val_fraction": self.val_fraction,
            "class_names": list(self._opened.class_names),
            "decoding": self.decoding,
            "image_size": self.image_size,
            "train_transform": _text("train", dealt.train.transform),
            "test_transform": _text("test", dealt.test.transform),
            **({} if self.first_experiences is None else {"first_experiences": self.first_experiences}),
        }

    def close(self) -> None:
        """Stop the workers; the next batch starts new ones."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Finish a batch on the device: images of uint8 become floats in [0, 1], in a new tensor."""
        images, *rest = batch
        if images.dtype != torch.uint8:
            return batch
        trainer = self._serving
        floats = scaled(images)
        return [floats if trainer is None else trainer.precision_plugin.convert_input(floats), *rest]

    @property
    def _serving(self) -> Trainer | None:
        """The trainer, while it runs a stage."""
        running = self.trainer is not None and self.trainer.state.stage is not None
        return self.trainer if running else None

    # The current experience

    def enter(self, experience: Experience) -> None:
        """Serve ``experience`` from now on: its training images, and the test images of all classes seen."""
        self._experience = experience

    @property
    def experience(self) -> Experience:
        """The current experience."""
        if self._experience is None:
            raise RuntimeError("No experience is served yet: call enter(experience) first.")
        return self._experience

    def train_dataloader(self) -> DataLoader[Batch]:
        """Serve the training images of the experience, augmented and reshuffled in every epoch."""
        train, entropy = self._dealt.train, (self.seed, self.experience.index, _TRAINING)
        sampler = DrawSampler(self._current(train), entropy, shuffle=True)
        return self._loader(train, RankBatches(sampler, self.batch_size, *place()))

    def test_dataloader(self) -> DataLoader[Batch]:
        """Serve the test images of all classes seen, one experience after another.

        A batch holds images of one experience in the order of the dataset, with the index of each image's
        domain (B,) if there are domains; later experiences serve the same batches before their own.
        """
        test, seen = self._dealt.test, self.experience.classes.stop
        own, groups = test.below([one.classes.stop for one in self.experiences if one.classes.stop <= seen])
        sampler = DrawSampler(own, (self.seed, self.experience.index, _TEST), shuffle=False)
        batches = RankBatches(sampler, self.test_batch_size, *place(), groups)
        return self._loader(test, batches, self.blank_test_batches)

    def augmented_dataloader(self, pass_index: int) -> DataLoader[Batch]:
        """Serve every training image of the experience once, augmented anew for each index from 0."""
        train = self._dealt.train
        return self._one_pass(train, self._current(train), _AUGMENTED, pass_index)

    def plain_dataloader(self) -> DataLoader[Batch]:
        """Serve every training image of the experience once, transformed as at test time."""
        plain = self._dealt.plain
        return self._one_pass(plain, self._current(plain), _PLAIN)

    def held_out_dataloaders(self) -> tuple[DataLoader[Batch], DataLoader[Batch]] | None:
        """Serve training and test images of the held-out classes; None if no class is held out.

        Each loader serves the first 32 images of each class at most, since diagnostics read them after every
        experience. All are transformed as at test time, and their labels are numbered from 0.
        """
        if not self.held_out_classes:
            return None
        train, test = self._held_out
        return self._first_images(train), self._first_images(test)

    # Implementation

    def ready(self, sources: Sources) -> Sources:
        """Return ``sources`` as the loaders read them; a dataset may put a cache in front of them."""
        return sources

    @cached_property
    def found(self) -> Sources:
        """The images and their labels, before a cache is put in front of them."""
        return self.sources()

    @cached_property
    def _found(self) -> Sources:
        return self.ready(self.found)

    @cached_property
    def _opened(self) -> Sources:
        """The sources that are dealt: all but the held-out classes."""
        if not self.held_out_classes:
            return self._found
        return of_classes(self._found, range(len(self._found.class_names) - self.held_out_classes))

    @cached_property
    def _held_out(self) -> tuple[DrawnImages, DrawnImages]:
        number = len(self._found.class_names)
        outside = of_classes(self._found, range(number - self.held_out_classes, number))
        sources = for_validation(outside, self.val_fraction, self.val_seed)
        dealt = range(self.held_out_classes), self.test_transform()
        return DrawnImages(sources.train, *dealt), DrawnImages(sources.test, *dealt)

    def _first_images(self, images: DrawnImages) -> DataLoader[Batch]:
        first = [np.flatnonzero(images.positions == label) for label in range(self.held_out_classes)]
        indices = np.concatenate([of_class[:_HELD_OUT_IMAGES] for of_class in first])
        sampler = DrawSampler(indices, (self.seed, _HELD_OUT), shuffle=False)
        # Every process loads all of them: they are few.
        return self._loader(images, RankBatches(sampler, self.test_batch_size))

    @property
    def _dealt(self) -> _Served:
        if self._served is None:
            raise RuntimeError("The stream is not dealt yet: call setup() first.")
        return self._served

    def _require_valid_arguments(self) -> None:
        sizes = dict.fromkeys(("image_size", "batch_size", "test_batch_size"), 1)
        counts = dict.fromkeys(("seed", "num_workers", "held_out_classes", "val_seed"), 0)
        for name, least in (sizes | counts).items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} is {value} and must be at least {least}: choose a larger one.")
        if self.num_workers > _MOST_WORKERS:
            raise ValueError(
                f"num_workers is {self.num_workers}, and each is a process: choose {_MOST_WORKERS} or fewer."
            )
        if not 0 <= self.val_fraction < 1:
            raise ValueError(
                f"val_fraction is {self.val_fraction} and must be a share of the training images: give 0 for "
                "none, or a number below 1 such as 0.1."
            )
        if self.held_out_classes and self.held_out_classes >= len(self._found.class_names):
            raise ValueError(
                f"held_out_classes is {self.held_out_classes} of {len(self._found.class_names)} classes: "
                "leave at least one for the stream."
            )

    def _sizes(self) -> list[int]:
        return experience_sizes(
            len(self._opened.class_names), self.num_experiences, self.num_classes_per_experience
        )

    def _deal(self) -> _Served:
        sources = for_validation(self._opened, self.val_fraction, self.val_seed)
        augmented, plain = self.train_transform(), self.test_transform()
        stream = self._dealt_stream(sources).first(self.first_experiences)
        return _Served(
            stream=stream,
            train=DrawnImages(sources.train, stream.order, augmented),
            plain=DrawnImages(sources.train, stream.order, plain),
            test=DrawnImages(sources.test, stream.order, plain, sources.test_domains),
        )

    def _dealt_stream(self, sources: Sources) -> Stream:
        return deal(
            sources.train,
            sources.test,
            class_order(self.order, len(sources.class_names)),
            self._sizes(),
            class_names=sources.class_names,
            train_transform=self.train_transform(),
            test_transform=self.test_transform(),
        )

    def _current(self, images: DrawnImages) -> Indices:
        """Return the images of the experience's classes: all classes in the joint regime."""
        classes = self.experience.classes
        return np.flatnonzero((images.positions >= classes.start) & (images.positions < classes.stop))

    def _one_pass(self, images: DrawnImages, indices: Indices, *kind: int) -> DataLoader[Batch]:
        """Return a loader of a pass without gradients, in the order of ``indices``."""
        sampler = DrawSampler(indices, (self.seed, self.experience.index, *kind), shuffle=False)
        return self._loader(images, RankBatches(sampler, self.test_batch_size, *place()))

    @property
    def _image_bytes(self) -> int:
        """Bytes of this process's part of the largest batch of uint8 images; 1 if all images are floats."""
        batches = (self._dealt.train, self.batch_size), (self._dealt.test, self.test_batch_size)
        largest = max(size if isinstance(images.transform, View) else 0 for images, size in batches)
        _, processes = place()
        return max(1, math.ceil(largest / processes) * 3 * self.image_size**2)

    def _loader(self, images: DrawnImages, batches: RankBatches, blank: int = 0) -> DataLoader[Batch]:
        outside = self._held_out if self.held_out_classes else ()
        datasets = (self._dealt.train, self._dealt.plain, self._dealt.test, *outside)
        if self.num_workers and self._pool is None:
            self._pool = WorkerPool(datasets, self.num_workers, self._image_bytes)
        trainer = self._serving
        on_cpu = trainer is None or trainer.strategy.root_device.type == "cpu"
        return StreamLoader(
            dataset=images,
            batches=batches,
            num_workers=self.num_workers,
            # A batch for another device is finished after its transfer.
            finish=partial(self.on_after_batch_transfer, dataloader_idx=0) if on_cpu else copied,
            pool=self._pool if self.num_workers else None,
            index=datasets.index(images),
            blank=blank,
        )


@dataclass(frozen=True)
class _Served:
    """The stream, and the datasets of its loaders; each spans the whole stream."""

    stream: Stream
    train: DrawnImages
    plain: DrawnImages
    test: DrawnImages


def _text(name: str, transform: Transform) -> str:
    """Return the text of a transform, by which the protocol identifies it."""
    text = repr(transform)
    if " at 0x" in text:
        raise ValueError(
            f"The text of the {name} transform holds a memory address, {text}, which differs in every run: "
            "give it a __repr__ that names its settings."
        )
    return text
