"""ImageNet-100: three sets of 100 classes of ImageNet-1k that share one name.

The numbers of images of a class are those of ILSVRC2012, https://arxiv.org/abs/1409.0575, table 2.

Source: ``first100``, https://github.com/wuyuebupt/LargeScaleIncrementalLearning and most who followed;
``numpy1993``, https://github.com/hshustc/CVPR19_Incremental_Learning; ``cmc``, https://github.com/HobbitLong/CMC.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal, get_args

from cl_bench.data.manifest import require_fingerprint

Classes = Literal["first100", "numpy1993", "cmc"]

VARIANTS: tuple[Classes, ...] = get_args(Classes)

# Of the sorted WordNet ids, one a line. Two are published; the third is computed here from the list.
SHA256: dict[Classes, str] = {
    "first100": "e685f52fed1378fd4f7c3edbc80cf62403ad8fef69c03faef471d8a42c5289df",
    "numpy1993": "fce943fa2f5b5888cc86d3850a8466c0de2d45e7593b3637534ff1e6b73db6f9",
    "cmc": "d61d354b64beb3ce2c2c9cf04a874298362dc9fcd589e15ee34c5e4592145746",
}

EXTENSION = ".JPEG"
"""Extension of every image; other files in a class folder do not belong to the dataset."""

Split = Literal["train", "val"]

PER_CLASS: dict[Split, range] = {"train": range(732, 1301), "val": range(50, 51)}
"""Possible numbers of images in a class."""


def wnids(classes: Classes) -> list[str]:
    """Return the 100 WordNet ids of a variant, sorted; the label of a class is its index.

    Args:
        classes: ``first100``, the first 100 of ImageNet-1k's sorted ids (BiC, PODNet, DER, DyTox,
            Continual-CLIP); ``numpy1993``, drawn from them by NumPy's seed 1993 (LUCIR, PyCIL, FOSTER);
            ``cmc``, the list used in self-supervised learning.

    Raises:
        ValueError: If the list has another hash.
    """
    baked = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    ids = sorted(baked[classes].split())
    require_fingerprint(f"ImageNet-100 {classes}", ids, SHA256[classes])
    return ids


def images(root: Path, split: Split, wnid: str) -> list[str]:
    """Return the images of one class of a split, as paths below ``root`` in byte order; none is opened.

    Raises:
        FileNotFoundError: If the class has no image.
        ValueError: If a class cannot have so many images.
    """
    folder = root / split / wnid
    entries = os.listdir(folder) if folder.is_dir() else []
    found = sorted((name for name in entries if name.endswith(EXTENSION)), key=os.fsencode)
    remedy = f"prepare it with cl-bench prepare imagenet100 --root {root} --source FOLDER_OF_IMAGENET"
    if not found:
        raise FileNotFoundError(f"The folder {folder} has no image *{EXTENSION}: {remedy}")
    published = PER_CLASS[split]
    if len(found) not in published:
        numbers = dict.fromkeys((published[0], published[-1]))
        raise ValueError(
            f"{folder} holds {len(found):,} images *{EXTENSION}, and a class has "
            f"{' to '.join(f'{number:,}' for number in numbers)}: remove it, then {remedy}"
        )
    return [f"{split}/{wnid}/{name}" for name in found]
