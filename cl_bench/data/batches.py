"""How samples become a batch, and how a batch comes from a process that loads it."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import default_collate

from cl_bench.data.regions import Memory, Region, Regions, batched, fresh

_SHARED = "/dev/shm"


def collate(samples: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Return a batch: images first, then labels and what else the samples hold.

    Images of one size become one tensor, of whole numbers if they are; regions become a canvas.
    """
    images, *rest = zip(*samples, strict=True)
    return [_images(images, fresh), *_columns(rest)]


def copied(batch: Sequence[Any]) -> list[Any]:
    """Return ``batch`` with images in memory of its own, pinned where CUDA is there."""
    images, *rest = batch
    return [Regions(*map(_copied, images)) if isinstance(images, Regions) else _copied(images), *rest]


def _copied(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if torch.cuda.is_available() else tensor.clone()


class Loaded(NamedTuple):
    """What a process loaded: the samples of a batch, and where to put their images."""

    samples: Sequence[tuple[Any, ...]]
    place: int | None


class Packed(NamedTuple):
    """A batch on its way between two processes.

    Attributes:
        place: Where its images lie in the shared memory; None if they are here.
        images: Their shape, or the images themselves.
        regions: Sizes of regions and whether they are mirrored, if the images are a canvas.
        rest: Labels and what else there is, by column.
    """

    place: int | None
    images: Tensor | torch.Size
    regions: Sequence[npt.NDArray[Any]]
    rest: Sequence[Sequence[Any]]


class Places:
    """Memory shared by processes, in which images travel; fresh memory would be cleared for every batch.

    Args:
        number: Batches that are under way at one time.
        size: Bytes for the images of each.

    Raises:
        OSError: If there is not as much shared memory.
    """

    def __init__(self, number: int, size: int) -> None:
        _require_room(number * size)
        self._shared = torch.empty(number, size, dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        """Return the number of places."""
        return len(self._shared)

    def packed(self, loaded: Loaded) -> Packed:
        """Return the loaded samples as a batch, its images put into their place if they fit."""
        images, *rest = zip(*loaded.samples, strict=True)
        batch = _images(images, partial(self._memory_of, loaded.place))
        tensor, *regions = batch if isinstance(batch, Regions) else (batch,)
        numbers = [part.numpy() for part in regions]
        if loaded.place is not None and tensor.data_ptr() == self._shared[loaded.place].data_ptr():
            return Packed(loaded.place, tensor.shape, numbers, rest)
        return Packed(None, tensor, numbers, rest)

    def unpacked(self, packed: Packed) -> list[Any]:
        """Return the batch; its images are still in their place."""
        place, images, regions, rest = packed
        tensor = images if isinstance(images, Tensor) else self._at(place, images)
        batch = Regions(tensor, *map(torch.from_numpy, regions)) if regions else tensor
        return [batch, *_columns(rest)]

    def _memory_of(self, place: int | None, shape: Sequence[int]) -> Tensor:
        fits = math.prod(shape) <= int(self._shared.shape[1])
        return self._at(place, shape) if fits and place is not None else fresh(shape)

    def _at(self, place: int | None, shape: Sequence[int]) -> Tensor:
        images: Tensor = self._shared[place, : math.prod(shape)].view(*shape)
        return images


def _require_room(size: int) -> None:
    """Refuse more shared memory than there is, as some versions of torch die of the attempt."""
    if os.path.isdir(_SHARED) and size > shutil.disk_usage(_SHARED).free:
        raise OSError(
            f"Batches that are loaded ahead take {size / 1e6:.0f} MB of shared memory, more than is free in "
            f"{_SHARED}: choose fewer --num_workers, a smaller --batch_size and --test_batch_size, or "
            "enlarge the folder (docker run --shm-size)."
        )


def _images(images: Sequence[Any], memory: Memory) -> Tensor | Regions:
    first = images[0]
    if isinstance(first, Region):
        return batched(images, memory)
    if isinstance(first, Tensor) and first.dtype == torch.uint8:
        return torch.stack(images, out=memory((len(images), *first.shape)))  # type: ignore[arg-type]
    collated: Tensor = default_collate(list(images))
    return collated


def _columns(values: Sequence[Sequence[Any]]) -> list[Any]:
    collated: list[Any] = default_collate(list(zip(*values, strict=True)))
    return collated
