"""Your own images: one folder for each class, below ``train`` and below ``test``."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torchvision.transforms import v2

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.data.decoding import require_readable
from cl_bench.data.sources import FileSource, Sources
from cl_bench.data.stream import Transform
from cl_bench.processes.ranks import is_first

Interpolation = Literal["nearest", "bilinear", "bicubic"]

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFolder(StreamDataModule):
    """Images under ``root/train/<class>/`` and ``root/test/<class>/``, with the same classes in both.

    Classes and files are sorted by the bytes of their names. Names that begin with a dot are ignored. Files
    without the extension of an image, and images in other folders than those of the classes, are left out,
    and one line on stderr counts what was taken and what was not. A class may be spelt with composed letters
    in one split and with combining accents in the other. Images that cannot be read are found before
    training, as far as headers and ends of files show it. Grey images of 16 bits are scaled to 8; an
    orientation in the EXIF data is not applied. Training crops at random, resizes and mirrors; testing
    resizes and crops the centre.

    Args:
        root: Folder that holds ``train`` and ``test``.
        name: Name of the dataset in paths and tables; the name of the root folder if null. Datasets whose
            folders share a name need different ones.
        max_train_per_class: Number of training images of each class, the first by name; all if null.
        max_test_per_class: Number of test images of each class, the first by name; all if null.
        train_scale: Smallest and largest share of the area of an image that a random crop covers.
        train_interpolation: How a random crop is resized.
        test_resize: Short side in pixels of a test image before its centre is cropped; 8/7 of image_size if
            null, as 256 is of 224.
        test_interpolation: How a test image is resized.
        num_experiences: Number of equal experiences, T; 5 if no sizes are given either.
        num_classes_per_experience: Size of equal experiences, or a list with the size of each.
        kwargs: As in every dataset.
    """

    decoding = "Pillow, converted to RGB"

    def __init__(
        self,
        *,
        root: str = "",
        name: str | None = None,
        max_train_per_class: int | None = None,
        max_test_per_class: int | None = None,
        train_scale: tuple[float, float] = (0.08, 1.0),
        train_interpolation: Interpolation = "bilinear",
        test_resize: int | None = None,
        test_interpolation: Interpolation = "bilinear",
        num_experiences: int | None = None,
        num_classes_per_experience: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        if num_experiences is None and num_classes_per_experience is None:
            num_experiences = 5
        super().__init__(
            num_experiences=num_experiences, num_classes_per_experience=num_classes_per_experience, **kwargs
        )
        self.root = root
        self.name = name or (os.path.basename(os.path.abspath(root)) if root else "image_folder")
        self.max_train_per_class = max_train_per_class
        self.max_test_per_class = max_test_per_class
        self.train_scale = train_scale
        self.train_interpolation = train_interpolation
        self.test_resize = test_resize
        self.test_interpolation = test_interpolation

    def sources(self) -> Sources:
        """Find the files of every class; no image is opened."""
        root = self._existing_root()
        classes = _shared_classes(root)
        train = _split(root, "train", [one for one, _ in classes], _checked_limit(self.max_train_per_class))
        test = _split(root, "test", [other for _, other in classes], _checked_limit(self.max_test_per_class))
        if is_first():
            sys.stderr.write(f"{_summary(root, len(classes), train, test)}\n")
        return Sources(train.source, test.source, class_names=[one for one, _ in classes])

    def ready(self, sources: Sources) -> Sources:
        """Return ``sources`` if all files that will be used look readable; test images only if they will.

        Raises:
            ValueError: If an image cannot be read.
        """
        for source in (sources.train,) if self.val_fraction else (sources.train, sources.test):
            assert isinstance(source, FileSource)
            require_readable(source.root, source.files)
        return sources

    def train_transform(self) -> Transform:
        """Crop at random, resize and mirror."""
        smallest, largest = self.train_scale
        if not 0 < smallest <= largest <= 1:
            raise ValueError(
                f"train_scale is {smallest} to {largest}, not a range of shares of an image: "
                "give two ascending numbers above 0 and up to 1."
            )
        interpolation = v2.InterpolationMode(self.train_interpolation)
        crop = v2.RandomResizedCrop(self.image_size, scale=(smallest, largest), interpolation=interpolation)
        return _to_tensor(crop, v2.RandomHorizontalFlip())

    def test_transform(self) -> Transform:
        """Resize the short side and crop the centre."""
        short_side = round(self.image_size * 8 / 7) if self.test_resize is None else self.test_resize
        if short_side < self.image_size:
            raise ValueError(
                f"Test images resized to {short_side} pixels are too small for a crop of {self.image_size}: "
                f"set test_resize to {self.image_size} or more."
            )
        resize = v2.Resize(short_side, interpolation=v2.InterpolationMode(self.test_interpolation))
        return _to_tensor(resize, v2.CenterCrop(self.image_size))

    def _existing_root(self) -> Path:
        if not self.root:
            raise ValueError("No root is given: set --root to the folder that holds train and test.")
        root = Path(self.root)
        if not root.is_dir():
            raise FileNotFoundError(
                f"The folder {root} does not exist: set --root to the folder that holds train and test."
            )
        return root


def _to_tensor(*steps: v2.Transform) -> Transform:
    """Return a transform by ``steps`` from a Pillow image to a float tensor (3, H, W) in [0, 1]."""
    ending = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor())
    transform: Transform = v2.Compose([*steps, *ending])
    return transform


def _checked_limit(limit: int | None) -> int | None:
    if limit is not None and limit < 1:
        raise ValueError(f"A class cannot be limited to {limit} images: choose at least 1, or null for all.")
    return limit


def _names(folder: Path, *, folders: bool) -> list[str]:
    """Return the visible folders, or files, in ``folder``, sorted by the bytes of their names."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
        return sorted((entry.name for entry in visible if entry.is_dir() == folders), key=os.fsencode)


def _shared_classes(root: Path) -> list[tuple[str, str]]:
    """Return the folder of each class in ``train`` and in ``test``; they may be spelt in two ways."""
    train, test = _classes(root / "train"), _classes(root / "test")
    for split, classes, other, others in (("train", train, "test", test), ("test", test, "train", train)):
        missing = [folder for name, folder in classes.items() if name not in others]
        if missing:
            raise ValueError(
                f"The class {missing[0]} of {root} is in {split} but not in {other} "
                f"({len(missing)} such): add its folder to {other}, or remove it from {split}."
            )
    return [(folder, test[name]) for name, folder in train.items()]


def _classes(folder: Path) -> dict[str, str]:
    """Return the folder of each class by its composed name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder {folder} does not exist: put one folder for each class into it.")
    found: dict[str, str] = {}
    for name in _names(folder, folders=True):
        composed = unicodedata.normalize("NFC", name)
        if composed in found:
            raise ValueError(
                f"The folder {folder} has the class {composed} in two spellings, {found[composed]!a} and "
                f"{name!a}: put all of its images into one of the two folders."
            )
        found[composed] = name
    if not found:
        raise ValueError(f"The folder {folder} has no classes: put one folder for each class into it.")
    return found


@dataclass(frozen=True)
class _Split:
    """The images of a split.

    Attributes:
        source: Those that are taken.
        unknown: Number of files in class folders without the extension of an image, by their extension.
        elsewhere: Images that lie above or below the class folders, as paths below the root.
        beyond: Number of images beyond the limit of a class.
    """

    source: FileSource
    unknown: Counter[str]
    elsewhere: list[str]
    beyond: int


def _split(root: Path, split: str, folders: Sequence[str], limit: int | None) -> _Split:
    """Return the first ``limit`` images of each class of a split, class by class."""
    files: list[str] = []
    targets: list[int] = []
    unknown: Counter[str] = Counter()
    elsewhere = [f"{split}/{file}" for file in _names(root / split, folders=False) if _is_image(file)]
    beyond = 0
    for label, name in enumerate(folders):
        present = _names(root / split / name, folders=False)
        images = _images(root / split / name, present)
        files += [f"{split}/{name}/{image}" for image in images[:limit]]
        targets += [label] * len(images[:limit])
        beyond += len(images[limit:]) if limit else 0
        unknown.update(os.path.splitext(file)[1].lower() for file in present if not _is_image(file))
        elsewhere += _nested(root, f"{split}/{name}")
    return _Split(FileSource(root, files, targets), unknown, elsewhere, beyond)


def _is_image(file: str) -> bool:
    return file.lower().endswith(EXTENSIONS)


def _images(folder: Path, files: Sequence[str]) -> list[str]:
    """Return which of the files of one class are images."""
    if not files:
        raise ValueError(
            f"The class folder {folder} is empty: put images into it, or remove it from both splits."
        )
    images = [file for file in files if _is_image(file)]
    if not images:
        raise ValueError(
            f"None of the {len(files)} files in the class folder {folder} has the extension of an image: "
            f"use one of {', '.join(EXTENSIONS)}."
        )
    return images


def _nested(root: Path, folder: str) -> Iterator[str]:
    """Yield the visible images in folders below a class folder, as paths below the root; links end there."""
    for place, folders, files in os.walk(root / folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if place != str(root / folder):
            below = Path(place).relative_to(root).as_posix()
            yield from (f"{below}/{file}" for file in sorted(files) if _is_image(file) and file[0] != ".")


def _summary(root: Path, classes: int, train: _Split, test: _Split) -> str:
    """Return one line of what was taken from ``root`` and what was left out."""
    left: list[str] = []
    if beyond := train.beyond + test.beyond:
        left.append(f"{beyond:,} images beyond the limit of a class")
    if unknown := train.unknown + test.unknown:
        kinds = ", ".join(sorted(kind or "no extension" for kind in unknown))
        left.append(f"{unknown.total():,} files of other kinds ({kinds})")
    if elsewhere := train.elsewhere + test.elsewhere:
        left.append(f"{len(elsewhere):,} images outside of the class folders, such as {elsewhere[0]}")
    return (
        f"{root}: {len(train.source):,} training and {len(test.source):,} test images of {classes:,} classes"
        + (f"; left out: {'; '.join(left)}" if left else "; nothing left out")
    )
