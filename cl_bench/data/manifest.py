"""What a prepared root holds: every image with its hash, and every variant with the hash of its lists.

The images stand in a list of their own, which the manifest names by its hash: neither is believed without the
other. Two preparations of the same files write the same bytes: no time, no path, no order of events goes in.
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

FILE_NAME = "cl-bench-manifest.json"
LIST_NAME = "cl-bench-files.tsv.gz"
SCHEMA = 2


@dataclass(frozen=True)
class Scanned:
    """What was found of one image file.

    Attributes:
        path: Below the root, with slashes.
        size: In bytes.
        sha256: Of its bytes.
        height: In pixels.
        width: In pixels.
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
        name: What its choice is called, such as ``split coda``.
        train_images: Number of training images.
        test_images: Number of test images.
        classes: Number of classes.
        train_sha256: What the protocol of a run carries of the training images.
        test_sha256: Likewise of the test images.
        images_sha256: Of the bytes of all its image files, each path with its own sha256 a line; None where
            the two before are of pixels.
    """

    name: str
    train_images: int
    test_images: int
    classes: int
    train_sha256: str
    test_sha256: str
    images_sha256: str | None = None

    def line(self) -> str:
        """Return the variant in one line."""
        of_files = f", files {self.images_sha256[:16]}" if self.images_sha256 else ""
        return (
            f"{self.name}: {self.train_images:,} + {self.test_images:,} images, {self.classes} classes, "
            f"sha256 {self.train_sha256[:16]} + {self.test_sha256[:16]}{of_files}"
        )


@dataclass(frozen=True)
class Manifest:
    """What was written down of a prepared root.

    Attributes:
        variants: Of its dataset.
        images: Every image that was scanned, by path.
    """

    variants: list[Variant]
    images: list[Scanned]


def write(root: Path, dataset: str, images: Sequence[Scanned], variants: Iterable[Variant]) -> None:
    """Write the list of images, then the manifest, each whole or not at all."""
    ordered = sorted(images, key=lambda image: image.path)
    lines = "".join("\t".join(map(str, astuple(image))) + "\n" for image in ordered).encode()
    _replace(root / LIST_NAME, gzip.compress(lines, mtime=0))
    content = {
        "schema": SCHEMA,
        "dataset": dataset,
        "images": len(images),
        "bytes": sum(image.size for image in images),
        "list_sha256": hashlib.sha256(lines).hexdigest(),
        "variants": [asdict(variant) for variant in variants],
    }
    _replace(root / FILE_NAME, (json.dumps(content, indent=1) + "\n").encode())


def read(root: Path, dataset: str) -> Manifest | None:
    """Return the manifest of ``root``; None if there is none of this dataset, or its list is not the one."""
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
    """Return the variants that the manifest of ``root`` names, its list unread; none without a manifest."""
    content = _content(root, dataset)
    return [] if content is None else [Variant(**variant) for variant in content["variants"]]


def images_sha256(images: Iterable[Scanned]) -> str:
    """Return the sha256 of the bytes of ``images``: each path with its own sha256, a line, sorted."""
    lines = sorted(f"{image.path}\t{image.sha256}\n" for image in images)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def changed(root: Path, images: Iterable[Scanned]) -> str | None:
    """Return the path of an image that is missing or has another size than was scanned; None if none is."""
    for image in images:
        try:
            if (root / image.path).stat().st_size == image.size:
                continue
        except FileNotFoundError:
            pass
        return image.path
    return None


def _content(root: Path, dataset: str) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads((root / FILE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return content if (content.get("schema"), content.get("dataset")) == (SCHEMA, dataset) else None


def _scanned(line: str) -> Scanned:
    path, size, sha256, height, width = line.split("\t")
    return Scanned(path, int(size), sha256, int(height), int(width))


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def fingerprint(files: Iterable[str]) -> str:
    r"""Return the sha256 of the sorted paths, one a line, without a newline at the end.

    >>> fingerprint(["b/1.jpg", "a/2.jpg"]) == hashlib.sha256(b"a/2.jpg\nb/1.jpg").hexdigest()
    True
    """
    return _sha256(sorted(os.fsencode(file) for file in files))


def order_fingerprint(names: Iterable[str]) -> str:
    r"""Return the sha256 of the names in their order, one a line, without a newline at the end.

    >>> order_fingerprint(["b", "a"]) == hashlib.sha256(b"b\na").hexdigest()
    True
    """
    return _sha256(os.fsencode(name) for name in names)


def require_fingerprint(name: str, files: Iterable[str], expected: str) -> None:
    """Refuse a list that is not the published one, in whatever order.

    Raises:
        ValueError: If its hash differs from ``expected``.
    """
    _require_equal(name, fingerprint(files), expected)


def require_order(name: str, names: Iterable[str], expected: str) -> None:
    """Refuse a list that is not the published one, or is in another order.

    Raises:
        ValueError: If its hash differs from ``expected``.
    """
    _require_equal(name, order_fingerprint(names), expected)


def _sha256(lines: Iterable[bytes]) -> str:
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


def _require_equal(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(
            f"The list {name} has the sha256 {found[:16]}… and {expected[:16]}… is published: "
            "its copy in this checkout has been changed, restore it."
        )
