"""What a prepared root holds: every image with its hash, and every variant with the hash of its lists.

Two preparations of the same files write the same bytes: no time, no path, no order of events goes in.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cl_bench.prepare.scanning import Scanned

FILE_NAME = "cl-bench-manifest.json"
LIST_NAME = "cl-bench-files.tsv.gz"
SCHEMA = 1


@dataclass(frozen=True)
class Variant:
    """One published meaning of a dataset.

    Attributes:
        name: What its choice is called, such as ``split coda``.
        train_images: Number of training images.
        test_images: Number of test images.
        classes: Number of classes.
        train_sha256: What the protocol of a run carries of the training images.
        test_sha256: Likewise of the test images.
    """

    name: str
    train_images: int
    test_images: int
    classes: int
    train_sha256: str
    test_sha256: str

    def line(self) -> str:
        """Return the variant in one line."""
        return (
            f"{self.name}: {self.train_images:,} + {self.test_images:,} images, {self.classes} classes, "
            f"sha256 {self.train_sha256[:16]} + {self.test_sha256[:16]}"
        )


def write(root: Path, dataset: str, images: Sequence[Scanned], variants: Iterable[Variant]) -> None:
    """Write the list of images, then the manifest, each whole or not at all."""
    lines = "".join(
        f"{image.path}\t{image.size}\t{image.sha256}\t{image.height}\t{image.width}\n"
        for image in sorted(images, key=lambda image: image.path)
    )
    _replace(root / LIST_NAME, gzip.compress(lines.encode(), mtime=0))
    content = {
        "schema": SCHEMA,
        "dataset": dataset,
        "images": len(images),
        "bytes": sum(image.size for image in images),
        "variants": [asdict(variant) for variant in variants],
    }
    _replace(root / FILE_NAME, (json.dumps(content, indent=1) + "\n").encode())


def read(root: Path, dataset: str) -> list[Variant] | None:
    """Return the variants that the manifest of ``root`` lists, None if there is none of this dataset."""
    try:
        content: dict[str, Any] = json.loads((root / FILE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    if (content.get("schema"), content.get("dataset")) != (SCHEMA, dataset):
        return None
    return [Variant(**variant) for variant in content["variants"]]


def changed(root: Path) -> str | None:
    """Return the path of an image that is missing or has another size than was scanned; None if none is."""
    for line in gzip.decompress((root / LIST_NAME).read_bytes()).decode().splitlines():
        path, size, *_ = line.split("\t")
        try:
            if (root / path).stat().st_size == int(size):
                continue
        except FileNotFoundError:
            pass
        return path
    return None


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
