"""Decoding image files into RGB of 8 bits, and finding before a run those that cannot be decoded."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for files that it cannot decode."""

_AT_A_TIME = 64  # files in one task
_TAIL = 4096  # bytes in which the end mark is looked for; some cameras write a little behind it
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of a TIFF


def decoded(path: Path) -> Image.Image:
    """Return the image in ``path``, in RGB.

    Raises:
        ValueError: If the file cannot be decoded.
    """
    with opened(path) as image:
        image.load()
        return in_rgb(image)


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Yield the image in ``path`` with its size read but its pixels not yet decoded.

    Raises:
        ValueError: If the file cannot be read as an image, at once or later in the context.
    """
    try:
        with Image.open(path) as image:
            yield image
    except UNREADABLE as error:
        raise ValueError(
            f"The image {path} cannot be read ({error}): replace it, or remove it from the dataset."
        ) from error


def in_rgb(image: Image.Image) -> Image.Image:
    """Return ``image`` in RGB of 8 bits, as torchvision's loader does for images of 8 bits.

    Grey of more bits is scaled, black to 0 and white to 255. Transparency is dropped: a transparent pixel has
    the colour that the file stores for it. An orientation in the EXIF data is not applied.

    Raises:
        ValueError: If the numbers of the file have no known range, or cannot be converted.

    >>> in_rgb(Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16))).tobytes().hex(" ", 3)
    '000000 010101 ffffff'
    """
    if image.mode == "RGB":
        return image
    white = white_of(image)
    if white is None:
        image.info.pop("transparency", None)  # of a palette; Pillow would warn that it is dropped
        return image.convert("RGB")
    levels = np.asarray(image).astype(np.int64).clip(0, white)
    if image.format == "TIFF" and _tag(image, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO:
        levels = white - levels
    return Image.fromarray(((255 * levels + white // 2) // white).astype(np.uint8)).convert("RGB")


def white_of(image: Image.Image) -> int | None:
    """Return the number for white in grey of more than 8 bits; None if the image has 8 bits or fewer.

    Raises:
        ValueError: If the image holds numbers whose range is not known.
    """
    if image.mode.startswith("I;16"):
        return 2 ** int(_tag(image, _BITS_PER_SAMPLE, 16)) - 1 if image.format == "TIFF" else 2**16 - 1
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 2**16 - 1
    if image.mode in ("I", "F"):
        kind = "floating-point numbers" if image.mode == "F" else "whole numbers of 32 bits or with a sign"
        raise ValueError(
            f"it holds {kind}, and no file states which of them is white; convert it to 8 or 16 bits"
        )
    return None


def require_readable(root: Path, files: Sequence[str], workers: int | None = None) -> None:
    """Check that every file is an image that can be decoded, mostly without decoding it.

    Headers are read, and the end of the file is looked for: a JPEG or a PNG without its end mark is decoded,
    and so are images of formats without one. Damage in the middle of a file with both is not found.

    Args:
        root: Folder below which the files lie.
        files: Their paths below it, with slashes.
        workers: Number of threads; twice the number of CPUs if None.

    Raises:
        ValueError: If a file cannot be read; the error counts them and names the first.
    """
    tasks = [files[i : i + _AT_A_TIME] for i in range(0, len(files), _AT_A_TIME)]
    faults: list[str] = []
    with warnings.catch_warnings(), ThreadPoolExecutor(workers or 2 * (os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks appear when the image is decoded for training
        for found in pool.map(lambda task: [_fault(root, file) for file in task], tasks):
            faults += filter(None, found)
    if faults:
        raise ValueError(
            f"{len(faults):,} of {len(files):,} images below {root} cannot be read, such as {faults[0]}: "
            "replace them, or remove them from the dataset."
        )


def fault_of(error: Exception) -> str:
    """Return in words why a file cannot be decoded."""
    return "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__


def _fault(root: Path, file: str) -> str | None:
    """Return the path of a file with its fault, None if it has none."""
    try:
        with (root / file).open("rb") as stream, Image.open(stream) as image:
            white_of(image)
            if not _ended(image):
                image.load()
    except UNREADABLE as error:
        return f"{file} ({fault_of(error)})"
    return None


def _ended(image: Image.Image) -> bool:
    """Return whether the file of an image has the end mark of its format."""
    mark, stream = _ENDS.get(image.format or ""), getattr(image, "fp", None)
    if mark is None or stream is None:
        return False
    place = stream.tell()
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL))
    tail = stream.read()
    stream.seek(place)
    return mark in tail


def _tag(image: Image.Image, tag: int, default: int) -> int:
    """Return a number among the tags of a TIFF."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)
