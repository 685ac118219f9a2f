"""ImageNet-100: 100 classes of ImageNet-1k, in three variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cl_bench.contracts.photographs import PhotographFiles
from cl_bench.data.published import imagenet100
from cl_bench.data.published.imagenet100 import Classes, Split
from cl_bench.data.sources import FileSource, Sources


class ImageNet100(PhotographFiles):
    """The training images in ``root/train/<wnid>`` and the test images in ``root/val/<wnid>``.

    The root may be a folder of all of ImageNet-1k. Labels follow the sorted WordNet ids of the variant.
    Published with T=10.

    Args:
        classes: first100, the first 100 sorted WordNet ids (BiC, PODNet, DER, DyTox, Continual-CLIP);
            numpy1993, 100 drawn by NumPy's seed 1993 (LUCIR, PyCIL, FOSTER); cmc, the list used in
            self-supervised learning.
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
        """List the files of the 100 classes, all of which must be complete; no image is opened."""
        root = self._existing_root()
        wnids = imagenet100.wnids(self.classes)
        return Sources(
            train=_source(root, "train", wnids), test=_source(root, "val", wnids), class_names=wnids
        )


def _source(root: Path, split: Split, wnids: list[str]) -> FileSource:
    """Return the images of one split, class by class."""
    classes = [imagenet100.images(root, split, wnid) for wnid in wnids]
    targets = [label for label, files in enumerate(classes) for _ in files]
    return FileSource(root, [file for files in classes for file in files], targets)
