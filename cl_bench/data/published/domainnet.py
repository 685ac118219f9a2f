"""DomainNet: six domains of 345 classes in the official numbering, and the official lists of images.

Twelve lists, ``<domain>_train.txt`` and ``<domain>_test.txt``, name an image and its label in each line. The
numbering of the labels is not alphabetical, so the class names are stored here in its order.

Source: http://ai.bu.edu/M3SDA/, the cleaned version (clipart and painting from ``groundtruth``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cl_bench.data.manifest import require_order

Variant = Literal["official345", "no_quickdraw"]

VARIANTS: tuple[Variant, ...] = get_args(Variant)

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")

UNSAID = (
    "Published DomainNet rows do not state whether quickdraw is among their domains, and a list that many "
    "copied leaves it out: no published row is known to use this variant."
)
"""The caveat for every comparison of a result on DomainNet with a published one."""

NAMES_SHA256 = "ba29ce5a210ff5ac95e92d3ec26faac84f18000220a031207f62f28cefb9d07c"
"""Sha256 of the class names in the official numbering, one a line; computed here from the list."""

LIST_MD5 = {
    "clipart_train.txt": "b4349693a7f9c05c53955725c47ed6cb",
    "clipart_test.txt": "f5ddbcfd657a3acf9d0f7da10db22565",
    "infograph_train.txt": "379b50054f4ac2018dca4f89421b92d9",
    "infograph_test.txt": "779626b50869edffe8ea6941c3755c71",
    "painting_train.txt": "7db0e7ca73ad9982f6e1f7f3ef372c0a",
    "painting_test.txt": "232b35dc53f26d414686ae579e38d9b5",
    "quickdraw_train.txt": "b732ced3939ac8efdd8c0a889dca56cc",
    "quickdraw_test.txt": "c1a828fdfe216fb109f1c0083a252c6f",
    "real_train.txt": "8ebf02c2075fadd564705f0dc7cd6291",
    "real_test.txt": "6098816791c3ebed543c71ffa11b9054",
    "sketch_train.txt": "1233bd18aa9a8a200bf4cecf1c34ef3e",
    "sketch_test.txt": "d8a222e4672cfd585298aa14d02ea441",
}
"""Md5 of each official list."""


@dataclass(frozen=True)
class Listed:
    """Images of one split, domain after domain.

    Attributes:
        files: Paths below the root, ``<domain>/<class>/<file>`` (N,).
        targets: Their labels (N,).
        domains: Index of their domain among those of the variant (N,).
    """

    files: list[str]
    targets: list[int]
    domains: list[int]


def names() -> list[str]:
    """Return the name of each label.

    Raises:
        ValueError: If the list has another hash.
    """
    text = Path(__file__).with_name("domainnet_names.txt").read_text(encoding="utf-8")
    listed = text.splitlines()
    require_order("of DomainNet's classes", listed, NAMES_SHA256)
    return listed


def domains(variant: Variant) -> tuple[str, ...]:
    """Return the domains that a variant pools."""
    return DOMAINS if variant == "official345" else tuple(name for name in DOMAINS if name != "quickdraw")


def listed(root: Path, split: Literal["train", "test"], domain_names: Sequence[str]) -> Listed:
    """Read the official lists of ``domain_names`` under ``root``.

    Raises:
        FileNotFoundError: If a list is missing.
        ValueError: If a list is not the official one, or a label belongs to another class.
    """
    found = Listed([], [], [])
    classes = names()
    for place, domain in enumerate(domain_names):
        name = f"{domain}_{split}.txt"
        for line in _official_lines(root / name, LIST_MD5[name]):
            file, _, label = line.rpartition(" ")
            _require_class(file, label, classes, name)
            found.files.append(file)
            found.targets.append(int(label))
            found.domains.append(place)
    return found


def _official_lines(path: Path, md5: str) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"The list {path} does not exist: fetch it with cl-bench prepare domainnet --root {path.parent}"
        )
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise ValueError(f"{path} is not the official list, its md5 differs: remove it and prepare again.")
    return content.decode("utf-8").splitlines()


def _require_class(file: str, label: str, classes: Sequence[str], name: str) -> None:
    folder = file.split("/")[1] if file.count("/") == 2 else ""
    if not (label.isdigit() and int(label) < len(classes) and classes[int(label)] == folder):
        raise ValueError(
            f"The line {file!r} of {name} gives the label {label!r}, which is not that of its class: "
            "remove the list and prepare again."
        )
