"""A decode cache: images are decoded and resized once, not in every epoch.

An image is stored with its short side resized, exactly as a test view resizes it before cropping the centre.
Test views from a cache of pixels are therefore bit-identical to those of the files, and from a cache of JPEGs
nearly equal. Training views are cropped from the resized image.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import PIL
from filelock import FileLock
from PIL import Image
from rich.console import Console
from rich.progress import track

from cl_bench.data.decoding import decoded, opened
from cl_bench.data.sources import FileSource
from cl_bench.data.views import CentreView, Picture, Pixels, resized_shape

CacheKind = Literal["none", "pixels", "jpeg"]

JPEG_QUALITY = 95
_SAMPLE = 64  # images that a JPEG cache's size is estimated from
_HEADROOM = 1.05
_AHEAD = 256  # encoded images that wait to be written


class CachedSource:
    """A source of files whose images are read from a cache, which is built first if necessary.

    Args:
        source: The files.
        kind: ``pixels``, uint8 in a memory-mapped file; ``jpeg``, re-encoded.
        view: The test view, which resizes an image before it is stored.
        folder: Folder of all caches.

    Raises:
        OSError: If the disk has no room for it.
        ValueError: If an image cannot be decoded.
    """

    def __init__(self, source: FileSource, kind: CacheKind, view: CentreView, folder: Path) -> None:
        self.source = source
        self.kind = kind
        self.targets = source.targets
        self._file, index = _built(source, kind, view, folder)
        self._offsets, self._shapes = index["offsets"], index["shapes"]
        self._bytes: npt.NDArray[np.uint8] | None = None  # opened by each process for itself

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the files."""
        return self.source.fingerprint

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        """Return image ``index``, resized, with its original label."""
        if self._bytes is None:
            self._bytes = np.memmap(self._file, dtype=np.uint8, mode="r")
        stored = self._bytes[self._offsets[index] : self._offsets[index + 1]]
        if self.kind == "pixels":
            return Pixels(stored.reshape(*self._shapes[index], 3)), self.targets[index]
        return Image.open(io.BytesIO(stored.tobytes())), self.targets[index]


def description(kind: CacheKind, view: CentreView) -> str:
    """Return the words for a cache in the protocol."""
    how = "uint8" if kind == "pixels" else f"JPEG of quality {JPEG_QUALITY}"
    return f"kept as {how} with a short side of {view.short_side} pixels, {view.interpolation}"


Index = dict[str, npt.NDArray[np.int64]]


def _built(source: FileSource, kind: CacheKind, view: CentreView, folder: Path) -> tuple[Path, Index]:
    """Return the file of the cache and its index; build them unless a complete cache exists."""
    place = folder / f"{kind}-{view.short_side}-{_key(source, kind, view)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"The folder {folder} of the decode cache cannot be created ({error.strerror}): "
            "choose another with --cache_dir."
        ) from error
    with FileLock(folder / f".{place.name}.lock"):
        if not place.is_dir():
            unfinished = folder / f".{place.name}.building"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            try:
                _build(source, kind, view, unfinished)
            except BaseException:
                shutil.rmtree(unfinished)
                raise
            unfinished.rename(place)
    with np.load(place / "index.npz") as index:
        return place / "images.bin", {name: index[name] for name in ("offsets", "shapes")}


def _key(source: FileSource, kind: CacheKind, view: CentreView) -> str:
    """Return the sha256 of all that determines the bytes: the files in order, and how each is stored."""
    stats = [(file, (source.root / file).stat()) for file in source.files]
    files = [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]
    made = [files, description(kind, view), PIL.__version__]  # the quality of a JPEG is in its description
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def _build(source: FileSource, kind: CacheKind, view: CentreView, folder: Path) -> None:
    paths = [source.root / file for file in source.files]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        shapes = list(pool.map(lambda path: _resized_shape(path, view.short_side), paths))
        encode = _pixels if kind == "pixels" else _jpeg
        _require_room(_size(kind, shapes, paths, view), len(paths), folder)
        offsets = [0]
        with (folder / "images.bin").open("wb") as stream:
            kept = _in_order(pool, lambda path: encode(view.resized(decoded(path))), paths)
            for encoded in _shown(kept, len(paths)):
                stream.write(encoded)
                offsets.append(stream.tell())
    np.savez(folder / "index.npz", offsets=np.array(offsets), shapes=np.array(shapes))


def _in_order(
    pool: ThreadPoolExecutor, encode: Callable[[Path], bytes], paths: list[Path]
) -> Iterable[bytes]:
    """Yield the encoded images in order, with a limited number of them in memory."""
    for start in range(0, len(paths), _AHEAD):
        yield from pool.map(encode, paths[start : start + _AHEAD])


def _shown(encoded: Iterable[bytes], number: int) -> Iterable[bytes]:
    """Yield the encoded images, with a progress bar on a terminal."""
    console = Console(stderr=True)
    quiet = not console.is_terminal
    return track(encoded, "keep images", number, console=console, transient=True, disable=quiet)


def _size(kind: CacheKind, shapes: list[tuple[int, int]], paths: list[Path], view: CentreView) -> int:
    """Return the size of a cache in bytes, for JPEGs an estimate from a sample spread over all images."""
    pixels = sum(height * width * 3 for height, width in shapes)
    if kind == "pixels":
        return pixels
    chosen = list(range(0, len(paths), max(1, len(paths) // _SAMPLE)))
    encoded = sum(len(_jpeg(view.resized(decoded(paths[i])))) for i in chosen)
    of_pixels = sum(shapes[i][0] * shapes[i][1] * 3 for i in chosen)
    return round(pixels * encoded / of_pixels)


def _require_room(size: int, images: int, folder: Path) -> None:
    """Print how large the cache will be, and raise if the disk has too little room."""
    free = shutil.disk_usage(folder).free
    sys.stderr.write(
        f"Building a cache of {images:,} decoded images, {size / 1e9:.2f} GB, in {folder.parent}\n"
    )
    if size * _HEADROOM > free:
        raise OSError(
            f"The cache of {images:,} decoded images takes {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are "
            f"free in {folder.parent}: set --cache to jpeg or none, or --cache_dir to a larger disk."
        )


def _resized_shape(path: Path, short_side: int) -> tuple[int, int]:
    with opened(path) as image:
        return resized_shape(image.height, image.width, short_side)


def _pixels(image: Image.Image) -> bytes:
    return image.tobytes()


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
