"""Sources of labelled images: files, arrays in memory, and parts of other sources."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from cl_bench.data.decoding import decoded
from cl_bench.data.manifest import fingerprint

if TYPE_CHECKING:  # cl-bench prepare reads sources without torch
    from torch import Tensor

Indices = npt.NDArray[np.int64]


class Source(Protocol):
    """Labelled images, decoded but not yet transformed."""

    @property
    def targets(self) -> Sequence[int]:
        """Original label of every image; reading them decodes nothing."""
        ...

    @property
    def fingerprint(self) -> str:
        """Sha256 of what identifies the images: the list of files, or the bytes of an array."""
        ...

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return image ``index``, a PIL image or a tensor (3, H, W), with its original label."""
        ...


@dataclass(frozen=True)
class Sources:
    """The images, classes and domains of a dataset.

    Attributes:
        train: Training images.
        test: Test images.
        class_names: Name of each original label.
        domains: Names of the domains that the images come from; empty if the dataset has none.
        train_domains: Index in ``domains`` of each training image.
        test_domains: Index in ``domains`` of each test image.
    """

    train: Source
    test: Source
    class_names: Sequence[str]
    domains: Sequence[str] = ()
    train_domains: Sequence[int] = ()
    test_domains: Sequence[int] = ()


class FileSource:
    """A source of image files, each decoded when it is read.

    Args:
        root: Folder below which the files lie.
        files: Their paths below it (N,), with slashes.
        targets: Their original labels (N,).
    """

    def __init__(self, root: Path, files: Sequence[str], targets: Sequence[int]) -> None:
        self.root = root
        self.files = files
        self.targets = targets

    @property
    def fingerprint(self) -> str:
        """Sha256 of the sorted paths, one a line; the pixels are not read."""
        return fingerprint(self.files)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return image ``index`` in RGB with its original label.

        Raises:
            ValueError: If the file cannot be decoded.
        """
        return decoded(self.root / self.files[index]), self.targets[index]


class PixelSource:
    """A source of small images of one size, held in memory.

    Args:
        pixels: RGB images (N, H, W, 3), uint8.
        targets: Their original labels (N,).
    """

    def __init__(self, pixels: npt.NDArray[np.uint8], targets: Sequence[int]) -> None:
        self.pixels = pixels
        self.targets = targets

    @property
    def fingerprint(self) -> str:
        """Sha256 of shape, labels and pixels."""
        return _sha256(self.pixels, self.targets)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return image ``index`` as a Pillow image with its original label."""
        return Image.fromarray(self.pixels[index]), self.targets[index]


class ArraySource:
    """A source of tensors of one size, held in memory.

    Args:
        images: Decoded images (N, 3, H, W), uint8.
        targets: Original labels (N,).
    """

    def __init__(self, images: Tensor, targets: Sequence[int]) -> None:
        self.images = images
        self.targets = list(targets)

    @property
    def fingerprint(self) -> str:
        """Sha256 of shape, labels and pixels."""
        return _sha256(self.images.numpy(), self.targets)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return image ``index`` (3, H, W) with its original label."""
        return self.images[index], self.targets[index]


class PartSource:
    """Some images of another source.

    Args:
        whole: The other source.
        indices: Its images that belong to the part, in the order of the part (n,).
    """

    def __init__(self, whole: Source, indices: Indices) -> None:
        self.whole = whole
        self.indices = indices
        self.targets: Sequence[int] = np.asarray(whole.targets, dtype=np.int64)[indices].tolist()

    @property
    def fingerprint(self) -> str:
        """Sha256 of the fingerprint of the whole and of the indices."""
        chosen = self.indices.astype("<i8").tobytes()
        return hashlib.sha256(self.whole.fingerprint.encode() + chosen).hexdigest()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return image ``index`` of the part with its original label."""
        return self.whole[int(self.indices[index])]


class ChosenClasses(PartSource):
    """The images of some classes of another source, their labels numbered from 0.

    Args:
        whole: The other source.
        labels: Original labels of the classes.
    """

    def __init__(self, whole: Source, labels: range) -> None:
        targets = np.asarray(whole.targets, dtype=np.int64)
        super().__init__(whole, np.flatnonzero((targets >= labels.start) & (targets < labels.stop)))
        self.labels = labels
        self.targets = [target - labels.start for target in self.targets]

    @property
    def fingerprint(self) -> str:
        """Sha256 of the fingerprint of the whole and of the labels."""
        labels = f"{self.whole.fingerprint} {self.labels.start} {self.labels.stop}"
        return hashlib.sha256(labels.encode()).hexdigest()

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return image ``index`` of the part with its new label."""
        image, label = super().__getitem__(index)
        return image, label - self.labels.start


def of_classes(sources: Sources, labels: range) -> Sources:
    """Return the images of the classes ``labels``, their labels numbered from 0."""
    train, test = ChosenClasses(sources.train, labels), ChosenClasses(sources.test, labels)
    return replace(
        sources,
        train=train,
        test=test,
        class_names=[sources.class_names[label] for label in labels],
        train_domains=_at(train.indices, sources.train_domains),
        test_domains=_at(test.indices, sources.test_domains),
    )


def for_validation(sources: Sources, fraction: float, seed: int) -> Sources:
    """Return ``sources`` with held-out training images in place of the test images.

    Args:
        sources: The training and test images.
        fraction: Share of each class to hold out, as in :func:`held_out`; ``sources`` are unchanged if 0.
        seed: Seed of the choice.

    Raises:
        ValueError: If a class has a single training image.
    """
    if not fraction:
        return sources
    kept, held = held_out(sources.train.targets, fraction, seed)
    return replace(
        sources,
        train=PartSource(sources.train, kept),
        test=PartSource(sources.train, held),
        train_domains=_at(kept, sources.train_domains),
        test_domains=_at(held, sources.train_domains),
    )


def held_out(targets: Sequence[int], fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Return the indices of the images that are kept (n,) and of those held out (m,), both ascending.

    The same share of every class is held out, rounded, but at least one image is held out and one is kept.
    The choice within a class depends on the seed and the label only, not on the other classes.

    Args:
        targets: Label of every image.
        fraction: Share of each class to hold out, above 0 and below 1.
        seed: Seed of the choice.

    Raises:
        ValueError: If a class has a single image.

    >>> kept, held = held_out([0] * 10 + [1] * 20, 0.1, seed=0)
    >>> len(kept), [int(index) // 10 for index in held]
    (27, [0, 1, 2])
    """
    labels = np.asarray(targets, dtype=np.int64)
    held = [
        _chosen(np.flatnonzero(labels == label), fraction, (seed, int(label))) for label in np.unique(labels)
    ]
    chosen = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def require_files(root: Path, files: Collection[str], remedy: str) -> None:
    """Check that every file exists; folders are listed, and no file is opened.

    Args:
        root: Folder below which the files must lie.
        files: Their paths below it, with slashes.
        remedy: What to do, as the end of a sentence.

    Raises:
        FileNotFoundError: If a file is missing.
    """
    present = {
        f"{folder}/{name}"
        for folder in {os.path.dirname(file) for file in files}
        for name in _names(root / folder)
    }
    missing = sorted(set(files) - present)
    if missing:
        raise FileNotFoundError(
            f"{len(missing):,} of {len(files):,} images are missing below {root}, such as {missing[0]}: "
            + remedy
        )


def _sha256(pixels: npt.NDArray[np.uint8], targets: Sequence[int]) -> str:
    shape_and_labels = np.array([*pixels.shape, *targets], dtype="<i8")
    return hashlib.sha256(shape_and_labels.tobytes() + pixels.tobytes()).hexdigest()


def _at(indices: Indices, domains: Sequence[int]) -> Sequence[int]:
    return [domains[index] for index in indices.tolist()] if domains else ()


def _chosen(of_class: Indices, fraction: float, entropy: tuple[int, int]) -> Indices:
    if len(of_class) < 2:
        raise ValueError(
            f"Class {entropy[1]} has a single training image, which cannot be both learnt and held out: "
            "set val_fraction to 0, or add images."
        )
    number = min(max(1, round(fraction * len(of_class))), len(of_class) - 1)
    # RandomState is frozen: its numbers are the same under every version of NumPy.
    generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(entropy)))
    return of_class[generator.permutation(len(of_class))[:number]]


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
