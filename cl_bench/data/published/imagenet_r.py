"""ImageNet-R: its 30,000 images, the splits in use, and the two orders of its labels.

The archive holds ``imagenet-r/<wnid>/<style>_<number>.jpg``, numbered from 0 without gaps, so the number of
images of each style determines every file name of a class. The archive defines no test images.

Source: https://github.com/hendrycks/imagenet-r; the split lists, https://github.com/GT-RIPL/CODA-Prompt,
``dataloaders/splits/imagenet-r_{train,test}.yaml`` (MIT).
"""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from cl_bench.data.manifest import require_fingerprint, require_order

Split = Literal["coda", "inflora", "sorted80"]
LabelOrder = Literal["sorted", "published"]

SPLITS: tuple[Split, ...] = get_args(Split)

FOLDER = "imagenet-r"
"""Folder in the archive, with one folder for each class."""

NUM_TRAIN = 24_000
_INFLORA_SEED = 0  # its first seed: InfLoRA's code makes its split once, on the first run

# Of the sorted paths below FOLDER, one a line: for coda, those of the published list; for the others, those
# that the definition of the split gives, so that a change is detected.
SHA256: dict[tuple[Split, str], str] = {
    ("coda", "train"): "6b6014a06e97012adb968b55172d2f672d93ed2e36ce82b45e038ef23886321d",
    ("coda", "test"): "9e7f6243e605e2223739b158f26e442480eb940f9e24508bf6c02c939efdcc26",
    ("inflora", "train"): "fad4f6b199eb94d191c3ec1186b62f011cab47e67ff92ef4568c4c7c5b9bb21e",
    ("inflora", "test"): "15327c28ec67da5df3ce68eb3ef206c02a226401adf1a07573a92115085ffedb",
    ("sorted80", "train"): "d3379d7b66ba95e4451ab558b5f409452b0be51b82f2d836cae06e44e8bb4abf",
    ("sorted80", "test"): "3ddee0e25ae4abd8f3d887fc8f1144977d40007388a24db4458a0e8837ed32d8",
}

LABEL_ORDER_SHA256 = "4678d02857786285c5f0b7ac467772b46d0ea4f7c9965948849d21dc605266e4"
"""Sha256 of the WordNet ids in the numbering of the published lists, one a line."""


def files() -> list[str]:
    """Return the 30,000 paths below ``FOLDER``, in byte order."""
    listed: list[str] = []
    for wnid, styles in _baked()["images"].items():
        words = styles.split()
        counts = zip(words[::2], map(int, words[1::2]), strict=True)
        listed += [f"{wnid}/{style}_{i}.jpg" for style, count in counts for i in range(count)]
    return sorted(listed)


def split(name: Split) -> tuple[list[str], list[str]]:
    """Return the training and the test images of a split, as paths below ``FOLDER`` in byte order.

    Args:
        name: ``coda``, the list that most papers share; ``inflora``, the split that InfLoRA's code makes on
            its first run, ``random_split`` after ``torch.manual_seed(0)``; ``sorted80``, with the first 80 %
            of the file names of every class in byte order, rounded down, for training.

    Raises:
        ValueError: If a list has another hash than the recorded one.
    """
    paths = files()
    is_test = {"coda": _coda_test, "inflora": _inflora_test, "sorted80": _sorted80_test}[name](paths)
    train = [path for path, test in zip(paths, is_test, strict=True) if not test]
    test = [path for path, test in zip(paths, is_test, strict=True) if test]
    require_fingerprint(f"ImageNet-R {name} train", train, SHA256[name, "train"])
    require_fingerprint(f"ImageNet-R {name} test", test, SHA256[name, "test"])
    return train, test


def wnids(order: LabelOrder) -> list[str]:
    """Return the WordNet id of each label.

    Args:
        order: ``sorted``, the numbering of a folder reader (InfLoRA as run, PILOT, SD-LoRA, L2P);
            ``published``, the numbering of CODA-Prompt's lists. The same class order deals different
            experiences under each.

    Raises:
        ValueError: If the published order has another hash.
    """
    ids = sorted(_baked()["images"])
    if order == "sorted":
        return ids
    published = [ids[label] for label in _baked()["published_label_order"]]
    require_order("of ImageNet-R's published labels", published, LABEL_ORDER_SHA256)
    return published


@cache
def _baked() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return content


def _coda_test(paths: list[str]) -> list[bool]:
    packed = np.frombuffer(base64.b64decode(_baked()["coda_test"]), dtype=np.uint8)
    flags: list[bool] = np.unpackbits(packed, count=len(paths)).astype(bool).tolist()
    return flags


def _inflora_test(paths: list[str]) -> list[bool]:
    is_test = [False] * len(paths)
    for index in torch_permutation(len(paths), _INFLORA_SEED)[NUM_TRAIN:]:
        is_test[index] = True
    return is_test


def _sorted80_test(paths: list[str]) -> list[bool]:
    flags: list[bool] = []
    classes = [path.partition("/")[0] for path in paths]
    for wnid in wnids("sorted"):
        count = classes.count(wnid)
        train = 8 * count // 10
        flags += [False] * train + [True] * (count - train)
    return flags


def torch_permutation(n: int, seed: int) -> list[int]:
    """Return ``torch.randperm(n)`` on the CPU after ``torch.manual_seed(seed)``.

    The random streams of torch may change between versions; NumPy's ``RandomState`` is frozen. Both seed the
    same Mersenne Twister, of which torch uses 32 bits for each exchange.

    >>> torch_permutation(30_000, 0)[:5]
    [6044, 23117, 9729, 26406, 14191]
    """
    draws = np.random.RandomState(seed).randint(0, 2**32, size=n - 1, dtype=np.uint32).tolist()
    places = list(range(n))
    for i, draw in enumerate(draws):
        j = i + draw % (n - i)
        places[i], places[j] = places[j], places[i]
    return places
