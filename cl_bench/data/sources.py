"""Where labelled images come from, and parts of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from cl_bench.data.manifest import fingerprint

if TYPE_CHECKING:  # what prepares a dataset needs no torch
    from torch import Tensor

Indices = npt.NDArray[np.int64]


class Source(Protocol):
    """Labelled images, decoded and not yet transformed."""

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
    """What a dataset brings.

    Attributes:
        train: Training images.
        test: Test images.
        class_names: Name of each original label.
        domains: Names of the domains that the images come from, if the dataset has any.
        train_domains: Place in ``domains`` of each training image, likewise.
        test_domains: Place in ``domains`` of each test image, likewise.
    """

    train: Source
    test: Source
    class_names: Sequence[str]
    domains: Sequence[str] = ()
    train_domains: Sequence[int] = ()
    test_domains: Sequence[int] = ()


class FileSource:
    """A source of image files, each decoded when it is asked for.

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
        shape_and_labels = np.array([*self.pixels.shape, *self.targets], dtype="<i8")
        return hashlib.sha256(shape_and_labels.tobytes() + self.pixels.tobytes()).hexdigest()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return image ``index`` with its original label."""
        return Image.fromarray(self.pixels[index]), self.targets[index]


class ArraySource:
    """A source held in memory.

    Args:
        images: Decoded images (N, 3, H, W), uint8.
        targets: Original labels (N,).
    """

    def __init__(self, images: Tensor, targets: Sequence[int]) -> None:
        self.images = images
        self.targets = list(targets)

    @property
    def fingerprint(self) -> str:
        """Sha256 of shape, pixels and labels."""
        shape_and_labels = np.array([*self.images.shape, *self.targets], dtype="<i8")
        return hashlib.sha256(shape_and_labels.tobytes() + self.images.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return image ``index`` (3, H, W) with its original label."""
        return self.images[index], self.targets[index]


class PartSource:
    """Some images of a source.

    Args:
        whole: The source.
        indices: Which of its images, in which order (n,).
    """

    def __init__(self, whole: Source, indices: Indices) -> None:
        self.whole = whole
        self.indices = indices
        self.targets: Sequence[int] = np.asarray(whole.targets, dtype=np.int64)[indices].tolist()

    @property
    def fingerprint(self) -> str:
        """Sha256 of the source's own and of the indices."""
        chosen = self.indices.astype("<i8").tobytes()
        return hashlib.sha256(self.whole.fingerprint.encode() + chosen).hexdigest()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return image ``index`` of the part with its original label."""
        return self.whole[int(self.indices[index])]


class ChosenClasses:
    """The images of some classes of a source, which are numbered from 0 again.

    Args:
        source: Labelled images.
        labels: Which classes.

    Attributes:
        indices: Which images of the source these are (n,).
    """

    def __init__(self, source: Source, labels: range) -> None:
        targets = np.asarray(source.targets, dtype=np.int64)
        self._source = source
        self._labels = labels
        self.indices = np.flatnonzero((targets >= labels.start) & (targets < labels.stop))
        self.targets: list[int] = (targets[self.indices] - labels.start).tolist()

    @property
    def fingerprint(self) -> str:
        """Sha256 of the fingerprint of the source and the labels."""
        labels = f"{self._source.fingerprint} {self._labels.start} {self._labels.stop}"
        return hashlib.sha256(labels.encode()).hexdigest()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return image ``index`` with its new label."""
        image, label = self._source[int(self.indices[index])]
        return image, label - self._labels.start


def of_classes(found: Sources, labels: range) -> Sources:
    """Return the part of ``found`` that belongs to the classes ``labels``, numbered from 0 again."""
    train, test = ChosenClasses(found.train, labels), ChosenClasses(found.test, labels)
    return replace(
        found,
        train=train,
        test=test,
        class_names=[found.class_names[label] for label in labels],
        train_domains=[found.train_domains[i] for i in train.indices.tolist()] if found.domains else (),
        test_domains=[found.test_domains[i] for i in test.indices.tolist()] if found.domains else (),
    )


def held_out(targets: Sequence[int], fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Return the indices of the images that are kept (n,) and of those held out (m,), both ascending.

    Of every class the same share is held out, rounded, but at least one image, and at least one is kept.
    Which ones depends on the seed and the label alone, not on the other classes.

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


def decoded(path: Path) -> Image.Image:
    """Return the image in ``path``, in RGB.

    Raises:
        ValueError: If the file cannot be decoded.
    """
    with opened(path) as image:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Give the image in ``path``, of which nothing but the size is read yet.

    Raises:
        ValueError: If the file cannot be read as an image, then or inside.
    """
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"The image {path} cannot be read ({error}): replace it, or remove it from the dataset."
        ) from error


def require_files(root: Path, files: Collection[str], remedy: str) -> None:
    """Refuse a root below which a file is missing; folders are listed, and no file is opened.

    Args:
        root: Folder below which the files must lie.
        files: Their paths below it, with slashes.
        remedy: What to do, as the end of a sentence.

    Raises:
        FileNotFoundError: If one is missing.
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


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
