"""Your own images: one folder for each class, below ``train`` and below ``test``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torchvision.transforms import v2

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.data.sources import FileSource, Sources
from cl_bench.data.stream import Transform

Interpolation = Literal["nearest", "bilinear", "bicubic"]

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFolder(StreamDataModule):
    """Images under ``root/train/<class>/`` and ``root/test/<class>/``, with the same classes in both.

    Classes and files are sorted by the bytes of their names. Names that begin with a dot, and files without
    the extension of an image, are ignored. Training crops at random, resizes and mirrors; testing resizes and
    crops the centre.

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
        class_names = _shared_classes(root)
        return Sources(
            train=_source(root, "train", class_names, _checked_limit(self.max_train_per_class)),
            test=_source(root, "test", class_names, _checked_limit(self.max_test_per_class)),
            class_names=class_names,
        )

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


def _shared_classes(root: Path) -> list[str]:
    """Return the classes of both splits."""
    train, test = _classes(root / "train"), _classes(root / "test")
    for split, classes, other, others in (("train", train, "test", test), ("test", test, "train", train)):
        missing = sorted(set(classes) - set(others), key=os.fsencode)
        if missing:
            raise ValueError(
                f"The class {missing[0]} of {root} is in {split} but not in {other} "
                f"({len(missing)} such): add its folder to {other}, or remove it from {split}."
            )
    return train


def _classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder {folder} does not exist: put one folder for each class into it.")
    classes = _names(folder, folders=True)
    if not classes:
        raise ValueError(f"The folder {folder} has no classes: put one folder for each class into it.")
    return classes


def _source(root: Path, split: str, class_names: Sequence[str], limit: int | None) -> FileSource:
    """Return the first ``limit`` images of each class of a split, class by class."""
    files, targets = [], []
    for label, name in enumerate(class_names):
        images = _images(root / split / name)[:limit]
        files += [f"{split}/{name}/{image}" for image in images]
        targets += [label] * len(images)
    return FileSource(root, files, targets)


def _images(folder: Path) -> list[str]:
    """Return the image files of one class."""
    files = _names(folder, folders=False)
    if not files:
        raise ValueError(
            f"The class folder {folder} is empty: put images into it, or remove it from both splits."
        )
    images = [file for file in files if file.lower().endswith(EXTENSIONS)]
    if not images:
        raise ValueError(
            f"None of the {len(files)} files in the class folder {folder} has the extension of an image: "
            f"use one of {', '.join(EXTENSIONS)}."
        )
    return images
