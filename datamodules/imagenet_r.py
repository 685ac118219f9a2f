"""ImageNet-R: 200 classes of ImageNet as art, cartoons, sketches and toys; 30,000 images."""

from __future__ import annotations

from typing import Any

from cl_bench.contracts.photographs import PhotographFiles
from cl_bench.data.published import imagenet_r
from cl_bench.data.published.imagenet_r import LabelOrder, Split
from cl_bench.data.sources import FileSource, Sources, require_files


class ImageNetR(PhotographFiles):
    """The images of ``root/imagenet-r``, in one of three published splits.

    Published with T=5, 10 and 20. PILOT's split cannot be reproduced: it is two archives without a list.

    Args:
        split: coda, the list of 24,000 and 6,000 that most papers share; inflora, the split that InfLoRA's
            code makes on its first run; sorted80, the first 80 % of each class by name for training.
        label_order: sorted, by WordNet id, or published, as in the lists of coda; a class order permutes
            these labels, so the same class order deals different experiences under each.
        kwargs: As in every dataset of photographs.
    """

    name = "imagenet_r"

    def __init__(self, *, split: Split = "coda", label_order: LabelOrder = "sorted", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.split = split
        self.label_order = label_order

    @property
    def variants(self) -> dict[str, str]:
        """Split, label order and transforms."""
        return {"split": self.split, "label_order": self.label_order} | super().variants

    def sources(self) -> Sources:
        """Read the stored lists and check that every file exists; no image is opened."""
        folder = self._existing_root() / imagenet_r.FOLDER
        train, test = imagenet_r.split(self.split)
        require_files(folder, [*train, *test], self._remedy)
        wnids = imagenet_r.wnids(self.label_order)
        label = {wnid: place for place, wnid in enumerate(wnids)}
        train_source, test_source = (
            FileSource(folder, files, [label[file.partition("/")[0]] for file in files])
            for files in (train, test)
        )
        return Sources(train=train_source, test=test_source, class_names=wnids)
