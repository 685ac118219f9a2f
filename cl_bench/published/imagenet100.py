"""ImageNet-100: three sets of 100 classes of ImageNet-1k that share one name.

Source: ``first100``, https://github.com/wuyuebupt/LargeScaleIncrementalLearning and most who followed;
``numpy1993``, https://github.com/hshustc/CVPR19_Incremental_Learning; ``cmc``, https://github.com/HobbitLong/CMC.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, get_args

from cl_bench.filelists import require_fingerprint

Classes = Literal["first100", "numpy1993", "cmc"]

VARIANTS: tuple[Classes, ...] = get_args(Classes)

# Of the sorted WordNet ids, one a line. The first two are published; the third is made here from the list.
SHA256: dict[Classes, str] = {
    "first100": "e685f52fed1378fd4f7c3edbc80cf62403ad8fef69c03faef471d8a42c5289df",
    "numpy1993": "fce943fa2f5b5888cc86d3850a8466c0de2d45e7593b3637534ff1e6b73db6f9",
    "cmc": "d61d354b64beb3ce2c2c9cf04a874298362dc9fcd589e15ee34c5e4592145746",
}


def wnids(classes: Classes) -> list[str]:
    """Return the 100 WordNet ids of a variant, sorted: the label of a class is its place.

    Args:
        classes: ``first100``, the first 100 of ImageNet-1k's sorted ids (BiC, PODNet, DER, DyTox,
            Continual-CLIP); ``numpy1993``, drawn from them by NumPy's seed 1993 (LUCIR, PyCIL, FOSTER);
            ``cmc``, the list of self-supervised learning.

    Raises:
        ValueError: If a list no longer has its hash.
    """
    baked = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    ids = sorted(baked[classes].split())
    require_fingerprint(f"ImageNet-100 {classes}", ids, SHA256[classes])
    return ids
