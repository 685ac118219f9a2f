"""ImageNet-100: 100 of ImageNet-1k's classes; which ones is a variant."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cl_bench.datamodule import Sources
from cl_bench.images import FileSource
from cl_bench.photographs import Photographs
from cl_bench.published import imagenet100
from cl_bench.published.imagenet100 import Classes

_EXTENSION = ".JPEG"


class ImageNet100(Photographs):
    """The images of ``root/train/<wnid>`` and, for testing, of ``root/val/<wnid>``.

    The root may be a folder of the whole of ImageNet-1k. Labels are the sorted WordNet ids of the variant.
    Published with T=10.

    Args:
        classes: first100, the first 100 sorted WordNet ids (BiC, PODNet, DER, DyTox, Continual-CLIP);
            numpy1993, 100 drawn by NumPy's seed 1993 (LUCIR, PyCIL, FOSTER); cmc, the list of self-supervised
            learning.
        kwargs: As in every dataset of photographs.
    """

    name = "imagenet100"

    def __init__(self, *, classes: Classes = "first100", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes = classes

    @property
    def variants(self) -> dict[str, str]:
        """Class list and transforms."""
        return {"classes": self.classes} | super().variants

    def sources(self) -> Sources:
        """List the files of the 100 classes; no image is opened."""
        root = self._existing_root()
        wnids = imagenet100.wnids(self.classes)
        return Sources(
            train=_source(root, "train", wnids, self._remedy),
            test=_source(root, "val", wnids, self._remedy),
            class_names=wnids,
        )


def _source(root: Path, split: str, wnids: list[str], remedy: str) -> FileSource:
    """Return the images of one split, class after class, in byte order."""
    files: list[str] = []
    targets: list[int] = []
    for label, wnid in enumerate(wnids):
        folder = root / split / wnid
        images = sorted(name for name in _names(folder) if name.endswith(_EXTENSION))
        if not images:
            raise FileNotFoundError(f"There is no image *{_EXTENSION} in {folder}: {remedy}")
        files += [f"{split}/{wnid}/{name}" for name in images]
        targets += [label] * len(images)
    return FileSource(root, files, targets)


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []
