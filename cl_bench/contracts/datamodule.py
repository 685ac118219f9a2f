"""The contract of a dataset: what it brings, and how its stream is served."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from cl_bench.data.draws import DrawnImages, DrawSampler
from cl_bench.data.experience import Experience
from cl_bench.data.loading import RankBatches, StreamLoader, WorkerPool, copied
from cl_bench.data.regions import BatchedView, Regions
from cl_bench.data.sources import Indices, PartSource, Sources, held_out, of_classes
from cl_bench.data.stream import (
    Stream,
    Transform,
    class_order,
    deal,
    experience_sizes,
    order_name,
    require_one_division,
)
from cl_bench.data.views import CentreView, RandomView, scaled
from cl_bench.processes.ranks import place

Batch = tuple[Tensor, Tensor]
"""Images (B, 3, H, W) in [0, 1] and labels (B,), which are positions in the class order."""


_HELD_OUT_IMAGES = 32  # of each class for its mean, and as many for the accuracy


_MOST_WORKERS = 256


_TRAINING, _TEST, _PLAIN, _AUGMENTED, _OUTSIDE = range(5)


class StreamDataModule(LightningDataModule, ABC):
    """A dataset dealt into a stream, one experience of which is served at a time.

    A dataset is a subclass with a ``name`` that implements :meth:`sources`, :meth:`train_transform` and
    :meth:`test_transform`; its transforms draw from torch's generator alone. What a loader yields is then a
    function of the seed, the experience, the pass over it, the epoch and the image, whatever the number of
    workers, and leaves torch's and NumPy's global generators as they were.

    Args:
        num_experiences: Number of equal experiences, T; null if num_classes_per_experience is given.
        num_classes_per_experience: Size of equal experiences, or a list with the size of each.
        order: Class order: identity, numpy:SEED, python:SEED, or a list of labels.
        seed: Seed of the order of the images and of their augmentation; at least 0.
        image_size: Height and width of the images, in pixels.
        batch_size: Images in a batch of training, over all processes of a run together.
        test_batch_size: Images in a batch without gradients, likewise; twice batch_size if null.
        num_workers: Processes that load images; they change the speed, never a batch. They live as long as
            the stream is served, and each process of a run has its own.
        held_out_classes: How many classes, the last by original label, are no part of the stream; diagnostics
            measure on them what the backbone still knows of the rest of the world.
        val_fraction: Share of each class's training images to hold out and evaluate on, to choose settings
            by; the test images then stay closed. 0 for a result.
        val_seed: Seed of the choice of these images; every seed and class order shares it.
    """

    name: str
    """What paths and tables call the dataset."""

    decoding: str = "uint8 RGB"
    """How stored images become pixels; part of the protocol."""

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
        self._served: _Served | None = None
        self._pool: WorkerPool | None = None
        self._experience: Experience | None = None

    # What a dataset implements

    @abstractmethod
    def sources(self) -> Sources:
        """Find the images and their labels.

        Raises:
            FileNotFoundError: If the data are not there.
            ValueError: If they cannot be a dataset.
        """

    @abstractmethod
    def train_transform(self) -> Transform:
        """Return what turns a decoded image into a float tensor (3, H, W) in [0, 1], drawn anew each time."""

    @abstractmethod
    def test_transform(self) -> Transform:
        """Return what turns a decoded image into a float tensor (3, H, W) in [0, 1], always the same."""

    # The stream

    def setup(self, stage: str = "fit") -> None:
        """Check the arguments and deal the stream; a second call changes nothing.

        Args:
            stage: As Lightning names it; every stage needs the same.

        Raises:
            ValueError: If an argument or the data cannot be used.
            FileNotFoundError: If the data are not there.
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
        """The experiences, in the order in which they are met."""
        return self.stream.experiences

    @property
    def class_names(self) -> list[str]:
        """Name of the class at each position."""
        return [self._opened.class_names[label] for label in self.stream.order]

    @property
    def evaluated_on(self) -> str:
        """``test``, or ``validation`` where training images are held out and the test images stay closed."""
        return "validation" if self.val_fraction else "test"

    @property
    def test_images(self) -> list[int]:
        """Number of images to evaluate on, of the class at each position."""
        counts: list[int] = np.bincount(self._dealt.test.positions).tolist()
        return counts

    @property
    def domains(self) -> list[str]:
        """Names of the domains that the images come from; empty where a dataset has none."""
        return list(self._opened.domains)

    @property
    def domain_images(self) -> list[list[int]]:
        """Number of images to evaluate on, of each domain and of the class at each position."""
        test = self._dealt.test
        counts = np.zeros((len(self.domains), len(self.stream.order)), dtype=np.int64)
        if self.domains:
            np.add.at(counts, (test.domains, test.positions), 1)
        listed: list[list[int]] = counts.tolist()
        return listed

    @property
    def variants(self) -> dict[str, str]:
        """Which of its published meanings a dataset has here: what was chosen, by the name of the choice."""
        return {}

    @property
    def images_sha256(self) -> str | None:
        """Hash of the bytes of all image files as ``cl-bench prepare`` scanned them, for the provenance.

        None where nobody scanned them, and where the protocol's own hashes are of pixels.
        """
        return None

    @property
    def order_name(self) -> str:
        """Short name of the class order, as paths show it."""
        return order_name(self.order)

    @property
    def stream_length(self) -> int:
        """Number of experiences; the data are looked for only if the arguments alone do not tell."""
        require_one_division(self.num_experiences, self.num_classes_per_experience)
        if self.num_experiences is not None:
            return self.num_experiences
        if isinstance(self.num_classes_per_experience, list):
            return len(self.num_classes_per_experience)
        return len(self._sizes())

    def protocol(self) -> dict[str, object]:
        """Return what must be equal for two results on this dataset to stand side by side.

        Raises:
            ValueError: If a transform cannot be told from another by its text.
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
        }

    def close(self) -> None:
        """End the processes that load images; they are started anew when a batch is asked for."""
        if self._pool is not None:
            self._pool.close()
        self._pool = None

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Finish a batch on the device: whole numbers become [0, 1] as a new tensor, regions become views."""
        images, *rest = batch
        if isinstance(images, Regions):
            transform = self._dealt.train.transform
            assert isinstance(transform, BatchedView)
            finished = transform.views(images)
        elif images.dtype == torch.uint8:
            finished = scaled(images)
        else:
            return batch
        trainer = self._serving
        return [finished if trainer is None else trainer.precision_plugin.convert_input(finished), *rest]

    @property
    def _serving(self) -> Trainer | None:
        """The trainer that is at work, if one is."""
        working = self.trainer is not None and self.trainer.state.stage is not None
        return self.trainer if working else None

    @property
    def _on_accelerator(self) -> bool:
        """Whether batches are moved to another device, and finished there."""
        trainer = self._serving
        return trainer is not None and trainer.strategy.root_device.type != "cpu"

    # The experience at hand

    def enter(self, experience: Experience) -> None:
        """Serve ``experience`` from now on: its training images, and test images of all classes up to it."""
        self._experience = experience

    @property
    def experience(self) -> Experience:
        """The experience being served."""
        if self._experience is None:
            raise RuntimeError("No experience is being served yet: call enter(experience) first.")
        return self._experience

    def train_dataloader(self) -> DataLoader[Batch]:
        """Serve the training images of the experience, augmented, in an order that changes with the epoch."""
        train = self._dealt.train
        sampler = self._sampler(self._current(train), _TRAINING, shuffle=True)
        return self._loader(train, RankBatches(sampler, self.batch_size, *place()))

    def test_dataloader(self) -> DataLoader[Batch]:
        """Serve the test images of all classes seen, mixed as the dataset holds them.

        Where there are domains, a batch ends with the place of each image's domain (B,).
        """
        test = self._dealt.test
        seen = np.flatnonzero(test.positions < self.experience.classes.stop)
        return self._loader(test, self._batches(self._sampler(seen, _TEST)))

    def augmented_dataloader(self, pass_index: int) -> DataLoader[Batch]:
        """Serve every training image of the experience once, drawn as in training and anew for each pass.

        Args:
            pass_index: Which pass over the experience this is, from 0.
        """
        train = self._dealt.train
        sampler = self._sampler(self._current(train), _AUGMENTED, pass_index)
        return self._loader(train, self._batches(sampler))

    def plain_dataloader(self) -> DataLoader[Batch]:
        """Serve every training image of the experience once, transformed as at test time."""
        plain = self._dealt.plain
        return self._loader(plain, self._batches(self._sampler(self._current(plain), _PLAIN)))

    def held_out_dataloaders(self) -> tuple[DataLoader[Batch], DataLoader[Batch]] | None:
        """Serve images to train and to evaluate on, of the classes that are held out; None if none are.

        The first 32 of each class and kind, or all if there are fewer: they are looked at after every
        experience. All are transformed as at test time and labelled from 0.
        """
        if not self.held_out_classes:
            return None
        train, test = self._held_out
        return self._outside(train), self._outside(test)

    # How it is done

    def ready(self, sources: Sources) -> Sources:
        """Return ``sources`` as the loaders read them; a dataset may put a cache in front."""
        return sources

    @cached_property
    def _found(self) -> Sources:
        return self.ready(self.sources())

    @cached_property
    def _opened(self) -> Sources:
        """What is dealt: everything but the classes that are held out."""
        if not self.held_out_classes:
            return self._found
        return of_classes(self._found, range(len(self._found.class_names) - self.held_out_classes))

    @cached_property
    def _held_out(self) -> tuple[DrawnImages, DrawnImages]:
        number = len(self._found.class_names)
        sources = self._divided(of_classes(self._found, range(number - self.held_out_classes, number)))
        labels, plain = range(self.held_out_classes), self.test_transform()
        return DrawnImages(sources.train, labels, plain), DrawnImages(sources.test, labels, plain)

    def _outside(self, images: DrawnImages) -> DataLoader[Batch]:
        first = [np.flatnonzero(images.positions == label) for label in range(self.held_out_classes)]
        indices = np.concatenate([of_class[:_HELD_OUT_IMAGES] for of_class in first])
        sampler = DrawSampler(indices, (self.seed, _OUTSIDE), shuffle=False)
        everything = RankBatches(sampler, self.test_batch_size)  # on every process: there are few
        return self._loader(images, everything)

    @property
    def _dealt(self) -> _Served:
        if self._served is None:
            raise RuntimeError("The stream is not dealt yet: call setup() first.")
        return self._served

    def _require_valid_arguments(self) -> None:
        for name in ("image_size", "batch_size", "test_batch_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value} and must be at least 1: choose a larger one.")
        for name in ("seed", "num_workers", "held_out_classes", "val_seed"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} is {value} and cannot be negative: choose 0 or more.")
        if self.num_workers > _MOST_WORKERS:
            raise ValueError(
                f"num_workers is {self.num_workers}, a process each: choose {_MOST_WORKERS} or fewer."
            )
        if not 0 <= self.val_fraction < 1:
            raise ValueError(
                f"val_fraction is {self.val_fraction} and must be a share of the training images: give 0 for "
                "none, or a number below 1 such as 0.1."
            )
        if self.held_out_classes and self.held_out_classes >= len(self._found.class_names):
            raise ValueError(
                f"{self.held_out_classes} of {len(self._found.class_names)} classes cannot be held out: "
                "leave the stream at least one."
            )

    def _sizes(self) -> list[int]:
        return experience_sizes(
            len(self._opened.class_names), self.num_experiences, self.num_classes_per_experience
        )

    def _deal(self) -> _Served:
        divided = self._divided(self._opened)
        train, test = divided.train, divided.test
        augmented, plain = self.train_transform(), self.test_transform()
        stream = self._dealt_stream(divided)
        return _Served(
            stream=stream,
            train=DrawnImages(train, stream.order, augmented),
            plain=DrawnImages(train, stream.order, plain),
            test=DrawnImages(test, stream.order, plain, divided.test_domains),
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

    def _divided(self, sources: Sources) -> Sources:
        """Return ``sources``, evaluated on training images that are held out where settings are chosen."""
        if not self.val_fraction:
            return sources
        kept, held = held_out(sources.train.targets, self.val_fraction, self.val_seed)
        kept_domains, held_domains = (
            [sources.train_domains[index] for index in part.tolist()] if sources.domains else ()
            for part in (kept, held)
        )
        return replace(
            sources,
            train=PartSource(sources.train, kept),
            test=PartSource(sources.train, held),
            train_domains=kept_domains,
            test_domains=held_domains,
        )

    def _current(self, images: DrawnImages) -> Indices:
        """Return the images of the experience's classes; under the joint regime these are all classes."""
        classes = self.experience.classes
        return np.flatnonzero((images.positions >= classes.start) & (images.positions < classes.stop))

    def _sampler(self, indices: Indices, *what: int, shuffle: bool = False) -> DrawSampler:
        return DrawSampler(indices, (self.seed, self.experience.index, *what), shuffle=shuffle)

    def _batches(self, sampler: DrawSampler) -> RankBatches:
        """Return the batches of a pass without gradients."""
        return RankBatches(sampler, self.test_batch_size, *place())

    @property
    def _image_bytes(self) -> int:
        """Bytes of this process's images of the largest batch of whole numbers; 1 if there is none."""
        served = self._dealt
        train = self.batch_size * _views_of(served.train.transform)
        test = self.test_batch_size * _views_of(served.test.transform)
        _, processes = place()
        return max(1, math.ceil(max(train, test) / processes) * 3 * self.image_size**2)

    def _loader(self, images: DrawnImages, batches: RankBatches) -> DataLoader[Batch]:
        outside = self._held_out if self.held_out_classes else ()
        datasets = (self._dealt.train, self._dealt.plain, self._dealt.test, *outside)
        if self.num_workers and self._pool is None:
            self._pool = WorkerPool(datasets, self.num_workers, self._image_bytes)
        return StreamLoader(
            dataset=images,
            batches=batches,
            num_workers=self.num_workers,
            finish=copied
            if self._on_accelerator
            else partial(self.on_after_batch_transfer, dataloader_idx=0),
            pool=self._pool if self.num_workers else None,
            place=datasets.index(images),
        )


@dataclass(frozen=True)
class _Served:
    """The stream, and the datasets its loaders serve from; each spans the whole stream."""

    stream: Stream
    train: DrawnImages
    plain: DrawnImages
    test: DrawnImages


def _views_of(transform: Transform) -> float:
    """Return how many views take the room of an image that leaves its process in whole numbers.

    A canvas is as high and as wide as the largest crops, of landscapes and of portraits. Their short side is
    8/7 of a view's, and 3/4 of the long one for most photographs.
    """
    if isinstance(transform, BatchedView):
        return (8 / 7 * 4 / 3) ** 2
    return 1 if isinstance(transform, RandomView | CentreView) else 0


def _text(name: str, transform: Transform) -> str:
    """Return the transform as text."""
    text = repr(transform)
    if " at 0x" in text:
        raise ValueError(
            f"The {name} transform is described by a memory address, {text}, which no two runs share: "
            "give it a __repr__ that names its settings."
        )
    return text
