"""Stored images as sources: files that are decoded when they are asked for, and pixels held in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cl_bench.data.filelists import fingerprint


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


class Pixels:
    """An image that is an array already; only what is asked of it becomes a Pillow image.

    Args:
        array: RGB (H, W, 3), uint8.
    """

    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        self.array = array

    @property
    def height(self) -> int:
        """In pixels."""
        return int(self.array.shape[0])

    @property
    def width(self) -> int:
        """In pixels."""
        return int(self.array.shape[1])

    def crop(self, box: tuple[int, int, int, int]) -> Pixels:
        """Return the part from column and row to column and row, as Pillow counts them."""
        left, top, right, bottom = box
        return Pixels(self.array[top:bottom, left:right])

    def pillow(self) -> Image.Image:
        """Return the image as Pillow's."""
        return Image.fromarray(self.array)


Picture = Image.Image | Pixels
"""An image in RGB."""


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
