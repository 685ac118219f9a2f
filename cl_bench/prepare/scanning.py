"""Decoding every image once, so that no run meets a broken one."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from cl_bench.data.manifest import Scanned

_AT_A_TIME = 64  # files in one task


def scan(
    root: Path,
    files: Sequence[str],
    workers: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Scanned]:
    """Read and decode every file, in several threads: decoding and hashing release the interpreter.

    Args:
        root: Folder below which the files lie.
        files: Their paths below it, with slashes.
        workers: Number of threads; as many as there are CPUs if None.
        advance: Told of the number of images done.

    Returns:
        What was found, in the order of ``files``.

    Raises:
        ValueError: If an image cannot be decoded; the first is named.
        FileNotFoundError: If a file is missing.
    """
    tasks = [files[i : i + _AT_A_TIME] for i in range(0, len(files), _AT_A_TIME)]
    scanned: list[Scanned] = []
    broken: list[str] = []

    with warnings.catch_warnings(), ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large; twice as large is an error
        for found in pool.map(lambda task: [_scanned(root, file) for file in task], tasks):
            scanned += [image for image in found if isinstance(image, Scanned)]
            broken += [fault for fault in found if isinstance(fault, str)]
            advance(len(found))
    if broken:
        raise ValueError(
            f"{len(broken):,} of {len(files):,} images below {root} cannot be decoded, such as {broken[0]}: "
            "remove their folder, and unpack it anew by running again."
        )
    return scanned


def _scanned(root: Path, file: str) -> Scanned | str:
    """Return what was found of one file, or what is wrong with it."""
    content = (root / file).read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no image" if isinstance(error, UnidentifiedImageError) else str(error)
        return f"{file} ({reason})"
    return Scanned(file, len(content), hashlib.sha256(content).hexdigest(), height, width)
