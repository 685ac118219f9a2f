"""The manifest of a prepared root, and the hashes that identify lists of files.

The manifest lists every variant with the hashes of its file lists. The images are in a second file, which the
manifest names by hash: each is valid only with the other. Two preparations of the same files write the same
bytes, because no time, absolute path or order of events enters them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from cl_bench.results.files import replaced

FILE_NAME = "cl-bench-manifest.json"
LIST_NAME = "cl-bench-files.tsv.gz"
SCHEMA = 2


@dataclass(frozen=True)
class Scanned:
    """One image file as it was scanned.

    Attributes:
        path: Path below the root, with slashes.
        size: Size in bytes.
        sha256: Sha256 of its bytes.
        height: Height in pixels.
        width: Width in pixels.
    """

    path: str
    size: int
    sha256: str
    height: int
    width: int


@dataclass(frozen=True)
class Variant:
    """One published meaning of a dataset.

    Attributes:
        name: Name of the choice, such as ``split coda``.
        train_images: Number of training images.
        test_images: Number of test images.
        classes: Number of classes.
        train_sha256: Hash of the training images in the protocol of a run.
        test_sha256: Hash of the test images in the protocol of a run.
        images_sha256: Sha256 over all image files, one line of path and sha256 for each; None if the two
            hashes above are of pixels.
    """

    name: str
    train_images: int
    test_images: int
    classes: int
    train_sha256: str
    test_sha256: str
    images_sha256: str | None = None

    def line(self) -> str:
        """Return one line that describes the variant."""
        of_files = f", files {self.images_sha256[:16]}" if self.images_sha256 else ""
        return (
            f"{self.name}: {self.train_images:,} + {self.test_images:,} images, {self.classes} classes, "
            f"sha256 {self.train_sha256[:16]} + {self.test_sha256[:16]}{of_files}"
        )


@dataclass(frozen=True)
class Manifest:
    """What a preparation recorded about a root.

    Attributes:
        variants: Variants of its dataset.
        images: Every scanned image, sorted by path.
    """

    variants: list[Variant]
    images: list[Scanned]


def write(root: Path, dataset: str, images: Sequence[Scanned], variants: Iterable[Variant]) -> None:
    """Write the list of images, then the manifest, each atomically."""
    ordered = sorted(images, key=lambda image: image.path)
    lines = "".join("\t".join(map(str, astuple(image))) + "\n" for image in ordered).encode()
    with replaced(root / LIST_NAME) as stream:
        stream.write(gzip.compress(lines, mtime=0))
    content = {
        "schema": SCHEMA,
        "dataset": dataset,
        "images": len(images),
        "bytes": sum(image.size for image in images),
        "list_sha256": hashlib.sha256(lines).hexdigest(),
        "variants": [asdict(variant) for variant in variants],
    }
    with replaced(root / FILE_NAME) as stream:
        stream.write((json.dumps(content, indent=1) + "\n").encode())


def read(root: Path, dataset: str) -> Manifest | None:
    """Return the manifest of ``root``; None if this dataset has none there, or its list has another hash."""
    content = _content(root, dataset)
    if content is None:
        return None
    try:
        lines = gzip.decompress((root / LIST_NAME).read_bytes())
    except (FileNotFoundError, EOFError, gzip.BadGzipFile, zlib.error):
        return None
    if hashlib.sha256(lines).hexdigest() != content["list_sha256"]:
        return None
    return Manifest(
        [Variant(**variant) for variant in content["variants"]],
        [_scanned(line) for line in lines.decode().splitlines()],
    )


def variants(root: Path, dataset: str) -> list[Variant]:
    """Return the variants in the manifest of ``root``, without reading its list; none without a manifest."""
    content = _content(root, dataset)
    return [] if content is None else [Variant(**variant) for variant in content["variants"]]


def images_sha256(images: Iterable[Scanned]) -> str:
    """Return the sha256 over the sorted lines of path and sha256 of all ``images``."""
    lines = sorted(f"{image.path}\t{image.sha256}\n" for image in images)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def changed(root: Path, images: Iterable[Scanned]) -> str | None:
    """Return the path of the first image that is missing or has another size; None if all are as scanned."""
    for image in images:
        try:
            if (root / image.path).stat().st_size == image.size:
                continue
        except FileNotFoundError:
            pass
        return image.path
    return None


def fingerprint(files: Iterable[str]) -> str:
    r"""Return the sha256 of the sorted paths, one a line, without a newline at the end.

    >>> fingerprint(["b/1.jpg", "a/2.jpg"]) == hashlib.sha256(b"a/2.jpg\nb/1.jpg").hexdigest()
    True
    """
    return _sha256(sorted(os.fsencode(file) for file in files))


def order_fingerprint(names: Iterable[str]) -> str:
    r"""Return the sha256 of the names in the given order, one a line, without a newline at the end.

    >>> order_fingerprint(["b", "a"]) == hashlib.sha256(b"b\na").hexdigest()
    True
    """
    return _sha256(os.fsencode(name) for name in names)


def require_fingerprint(name: str, files: Iterable[str], expected: str) -> None:
    """Check that a list is the published one, in any order.

    Raises:
        ValueError: If its hash differs from ``expected``.
    """
    _require_equal(name, fingerprint(files), expected)


def require_order(name: str, names: Iterable[str], expected: str) -> None:
    """Check that a list is the published one, in the published order.

    Raises:
        ValueError: If its hash differs from ``expected``.
    """
    _require_equal(name, order_fingerprint(names), expected)


def _content(root: Path, dataset: str) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads((root / FILE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return content if (content.get("schema"), content.get("dataset")) == (SCHEMA, dataset) else None


def _scanned(line: str) -> Scanned:
    path, size, sha256, height, width = line.split("\t")
    return Scanned(path, int(size), sha256, int(height), int(width))


def _sha256(lines: Iterable[bytes]) -> str:
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


def _require_equal(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(
            f"The list {name} has the sha256 {found[:16]}…, not the published {expected[:16]}…: "
            "restore its copy in this checkout."
        )
