"""Worker processes that outlive an epoch, a data pass and an experience.

Lightning shuts the workers of a DataLoader down at the end of every fit and test, persistent or not. Here one
DataLoader, which Lightning never sees, loads from all datasets of a stream; what Lightning is given hands it
one batch list after another.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, default_collate

from cl_bench.data.regions import Memory, Region, Regions, batched, fresh
from cl_bench.processes.ranks import slice_of

_SHARED = "/dev/shm"
_AHEAD = 2  # batches that each process is ahead


class WorkerPool:
    """Processes that load from several datasets and live as long as the pool.

    Args:
        datasets: What is loaded from; the processes keep them as they are when the first batch is asked for.
        num_workers: Number of processes, at least 1.
        image_bytes: Memory shared with the processes for the images of each batch under way. Larger ones, and
            fractions, come in fresh memory, which takes longer.

    Raises:
        OSError: If there is not as much shared memory.
    """

    def __init__(self, datasets: Sequence[Dataset[Any]], num_workers: int, image_bytes: int = 1) -> None:
        self._together = _Together(datasets)
        # Every process is some batches ahead, and one is in use.
        self._places = Places(num_workers * _AHEAD + 1, image_bytes)
        self._batches = _Batches()
        self._num_workers = num_workers
        self._loader = self._started(self._batches, persistent=True)
        self._under_way: object | None = None

    def load(self, dataset: int, batches: Collection[Sequence[Any]]) -> Iterator[list[Any]]:
        """Yield the batches whose items are listed by ``batches``.

        The images of a batch may be overwritten once the next is asked for, those of the last once another
        pass begins. A pass that begins while another is under way gets processes of its own for its time.

        Args:
            dataset: Place of the dataset to load from.
            batches: The items of each batch, as its ``__getitem__`` takes them.
        """
        if self._under_way is not None:
            fresh = [_Wanted(dataset, batch, None) for batch in batches]
            yield from map(self._places.unpacked, self._started(_Batches(fresh)))
            return
        own = self._under_way = object()
        self._batches.listed = [
            _Wanted(dataset, batch, turn % len(self._places)) for turn, batch in enumerate(batches)
        ]
        loaded = iter(self._loader)
        try:
            for left in reversed(range(len(batches))):
                batch = self._places.unpacked(next(loaded))
                if not left:  # Lightning asks for no batch after the last, and would keep the pass under way
                    self._under_way = None
                yield batch
        finally:
            if self._under_way is own:  # given up before its end, or empty
                self._under_way = None

    def close(self) -> None:
        """End the processes."""
        iterator = self._loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]

    def _started(self, batches: _Batches, *, persistent: bool = False) -> DataLoader[Any]:
        return _loader(
            self._together,
            batches,
            self._places.packed,
            num_workers=self._num_workers,
            prefetch_factor=_AHEAD,
            persistent_workers=persistent,
        )


class _Wanted(NamedTuple):
    """A batch that a process is asked for.

    Attributes:
        dataset: Place of the dataset to load from.
        items: What to load.
        place: Where to put the images in the shared memory; fresh memory if None.
    """

    dataset: int
    items: Sequence[Any]
    place: int | None


class _Together(Dataset[Any]):
    """Several datasets as one."""

    def __init__(self, datasets: Sequence[Dataset[Any]]) -> None:
        self.datasets = datasets

    def __getitems__(self, wanted: _Wanted) -> Loaded:
        dataset = self.datasets[wanted.dataset]
        many = getattr(dataset, "__getitems__", None)
        samples = [dataset[item] for item in wanted.items] if many is None else many(wanted.items)
        return Loaded(samples, wanted.place)


class RankBatches(BatchSampler):
    """This process's part of every batch: that of its rank, in the order of the whole.

    All processes together see the batches that one alone would. A last batch of fewer images than processes
    leaves some without any; there the first image of the batch stands in, to be left out once it is loaded.

    Args:
        sampler: Draws of all images, the same on every process.
        batch_size: Images of a batch over all processes.
        rank: Which process this is.
        world_size: Number of processes.
    """

    def __init__(self, sampler: Sampler[Any], batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(sampler, batch_size, drop_last=False)
        self.rank = rank
        self.world_size = world_size

    @property
    def sizes(self) -> list[int]:
        """Number of this process's images in each batch."""
        return [len(range(count)[self._own(count)]) for count in self._counts()]

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield the draws of one batch after the other."""
        for batch in super().__iter__():
            yield batch[self._own(len(batch))] or batch[:1]

    def _counts(self) -> list[int]:
        whole, left = divmod(len(self.sampler), self.batch_size)  # type: ignore[arg-type]
        return [self.batch_size] * whole + [left] * bool(left)

    def _own(self, count: int) -> slice:
        return slice_of(count, self.rank, self.world_size)


class StreamLoader(DataLoader[Any]):
    """A loader of one pass; where there is a pool it starts no process, and Lightning has none to stop.

    Args:
        batches: Which images a batch is of.
        finish: Applied to every batch before it leaves the loader; what it returns is new.
        pool: Who loads, if not this process.
        place: Place of the dataset among those of the pool.
        kwargs: As for every DataLoader.
    """

    def __init__(
        self,
        *,
        batches: RankBatches,
        finish: Callable[[Any], Any],
        pool: WorkerPool | None = None,
        place: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_sampler=batches, **kwargs)
        self.batches = batches
        self.finish = finish
        self.pool = pool
        self.place = place
        self._done = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of one pass; nothing is loaded before the first is asked for."""
        done, self._done = self._done, 0
        batches = list(self.batches)[done:]
        if self.pool is None:
            loaded: Iterable[Any] = _loader(self.dataset, _Batches(batches), collate)
        else:
            loaded = self.pool.load(self.place, batches)
        for batch, size in zip(loaded, self.batches.sizes[done:], strict=True):
            own = batch if size else _emptied(batch)
            yield self.finish(own)

    def state_dict(self) -> dict[str, int]:
        """Return how many batches the next pass leaves out."""
        return {"batches": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next pass go on after some batches, as if it had begun with them."""
        self._done = state["batches"]


def _emptied(batch: Sequence[Any]) -> list[Any]:
    """Return a batch of the same form without an image."""
    return [Regions(*_emptied(part)) if isinstance(part, Regions) else part[:0] for part in batch]


class _Batches(Sampler[Any]):
    """Hands on whatever batches are listed at the time."""

    def __init__(self, listed: Iterable[Any] = ()) -> None:
        self.listed = listed

    def __iter__(self) -> Iterator[Any]:
        return iter(self.listed)


def _loader(
    dataset: Dataset[Any], batches: _Batches, collated: Callable[[Any], Any], **kwargs: Any
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collated,
        # A loader draws a seed for its workers when it is iterated. No draw depends on it, and without a
        # generator of its own it would come from the global one.
        generator=torch.Generator(),
        **kwargs,
    )


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
