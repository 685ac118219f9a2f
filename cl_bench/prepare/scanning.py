"""Decoding every image once, so that a broken image is found before any run."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from cl_bench.data.decoding import UNREADABLE, fault_of, white_of
from cl_bench.data.manifest import Scanned

_AT_A_TIME = 64  # files in one task


def scan(
    root: Path,
    files: Sequence[str],
    workers: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Scanned]:
    """Read, hash and decode every file in several threads; both hashing and decoding release the GIL.

    Args:
        root: Folder below which the files lie.
        files: Their paths below it, with slashes.
        workers: Number of threads; the number of CPUs if None.
        advance: Called with the number of images scanned since the last call.

    Returns:
        The scanned images, in the order of ``files``.

    Raises:
        ValueError: If an image cannot be decoded; the error names the first one.
        FileNotFoundError: If a file is missing.
    """
    tasks = [files[i : i + _AT_A_TIME] for i in range(0, len(files), _AT_A_TIME)]
    scanned: list[Scanned] = []
    broken: list[str] = []

    with warnings.catch_warnings(), ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice that size is an error
        for found in pool.map(lambda task: [_scanned(root, file) for file in task], tasks):
            scanned += [image for image in found if isinstance(image, Scanned)]
            broken += [fault for fault in found if isinstance(fault, str)]
            advance(len(found))
    if broken:
        raise ValueError(
            f"{len(broken):,} of {len(files):,} images below {root} cannot be decoded, such as {broken[0]}: "
            "remove their folder and run again to unpack it."
        )
    return scanned


def _scanned(root: Path, file: str) -> Scanned | str:
    """Return the scanned file, or a description of its fault."""
    content = (root / file).read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            white_of(image)
            image.load()
            width, height = image.size
    except UNREADABLE as error:
        return f"{file} ({fault_of(error)})"
    return Scanned(file, len(content), hashlib.sha256(content).hexdigest(), height, width)
