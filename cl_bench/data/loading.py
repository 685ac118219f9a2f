"""Batches of one pass over a dataset, loaded by workers that outlive epochs, data passes and experiences.

Lightning shuts the workers of a DataLoader down at the end of every fit and test, persistent or not. Here one
DataLoader, which Lightning never sees, loads from all datasets of a stream. The loaders that Lightning gets
pass it one list of batches after another.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, default_collate

from cl_bench.processes.ranks import slice_of

_SHARED_MEMORY = "/dev/shm"
_AHEAD = 2  # batches that each worker loads in advance


class WorkerPool:
    """Worker processes that load from several datasets and live as long as the pool.

    Args:
        datasets: What to load from; the workers keep the state that the datasets have at the first batch.
        num_workers: Number of processes, at least 1.
        image_bytes: Shared memory for the images of each batch in flight, in bytes. Larger batches, and
            images of floats, travel in fresh memory, which takes longer.

    Raises:
        OSError: If there is less shared memory than the batches in flight need.
    """

    def __init__(self, datasets: Sequence[Dataset[Any]], num_workers: int, image_bytes: int = 1) -> None:
        self._datasets = _Datasets(datasets)
        # Every worker is some batches ahead, and one batch is in use.
        self._buffers = _Buffers(num_workers * _AHEAD + 1, image_bytes)
        self._batches = _Batches()
        self._num_workers = num_workers
        self._loader = self._started(self._batches, persistent=True)
        self._current_pass: object | None = None

    def load(self, dataset: int, batches: Collection[Sequence[Any]]) -> Iterator[list[Any]]:
        """Yield ``batches``, each a list of images, labels and whatever else a sample holds.

        The images of a batch may be overwritten once the next batch is requested, those of the last batch
        once another pass begins. A pass that begins during another one gets workers of its own.

        Args:
            dataset: Index of the dataset to load from.
            batches: The items of each batch, as ``__getitem__`` of the dataset takes them.
        """
        if self._current_pass is not None:
            fresh = [_Request(dataset, batch, None) for batch in batches]
            yield from map(self._buffers.unpacked, self._started(_Batches(fresh)))
            return
        own = self._current_pass = object()
        self._batches.listed = [
            _Request(dataset, batch, turn % len(self._buffers)) for turn, batch in enumerate(batches)
        ]
        loaded = iter(self._loader)
        try:
            for left in reversed(range(len(batches))):
                batch = self._buffers.unpacked(next(loaded))
                if not left:  # Lightning requests no batch after the last, which would keep the pass open
                    self._current_pass = None
                yield batch
        finally:
            if self._current_pass is own:  # abandoned before its end, or empty
                self._current_pass = None

    def close(self) -> None:
        """Stop the workers."""
        iterator = self._loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]

    def _started(self, batches: _Batches, *, persistent: bool = False) -> DataLoader[Any]:
        return _loader(
            self._datasets,
            batches,
            self._buffers.packed,
            num_workers=self._num_workers,
            prefetch_factor=_AHEAD,
            persistent_workers=persistent,
        )


class RankBatches(BatchSampler):
    """The share of every batch that belongs to the rank of this process, in the order of the batch.

    Together, all processes load the batches that a single one would. A last batch of fewer images than
    processes leaves some of them without an image: they load its first image and discard it.

    Args:
        sampler: Draws of all images, the same in every process.
        batch_size: Images of a batch over all processes, at most.
        rank: Rank of this process.
        world_size: Number of processes.
        groups: Sizes of consecutive groups of draws; no batch spans two. All draws are one group if None.
    """

    def __init__(
        self,
        sampler: Sampler[Any],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        groups: Sequence[int] | None = None,
    ) -> None:
        super().__init__(sampler, batch_size, drop_last=False)
        self.rank = rank
        self.world_size = world_size
        self.groups = [len(sampler)] if groups is None else list(groups)  # type: ignore[arg-type]

    @property
    def sizes(self) -> list[int]:
        """Number of this process's images in each batch."""
        return [len(range(count)[self._own(count)]) for count in self._counts()]

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield the draws of one batch after another."""
        draws = iter(self.sampler)
        for count in self._counts():
            batch = list(islice(draws, count))
            yield batch[self._own(count)] or batch[:1]

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._counts())

    def _counts(self) -> list[int]:
        counts = []
        for size in self.groups:
            whole, left = divmod(size, self.batch_size)
            counts += [self.batch_size] * whole + [left] * bool(left)
        return counts

    def _own(self, count: int) -> slice:
        return slice_of(count, self.rank, self.world_size)


class StreamLoader(DataLoader[Any]):
    """A loader of one pass; with a pool it starts no process, so Lightning has none to stop.

    Args:
        batches: The draws of each batch.
        finish: Called with every batch; it must return new tensors.
        pool: The workers that load; this process loads if None.
        index: Index of the dataset in the pool.
        blank: Number of first batches whose images (B, 0) are not loaded.
        kwargs: As for every DataLoader.
    """

    def __init__(
        self,
        *,
        batches: RankBatches,
        finish: Callable[[Any], Any],
        pool: WorkerPool | None = None,
        index: int = 0,
        blank: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_sampler=batches, **kwargs)
        self.batches = batches
        self.finish = finish
        self.pool = pool
        self.index = index
        self.blank = blank
        self._done = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of one pass; nothing is loaded before the first batch is requested."""
        done, self._done = self._done, 0
        batches = list(self.batches)[done:]
        dataset: Any = self.dataset
        blank = (default_collate([dataset.blank(draw) for draw in batch]) for batch in batches[: self.blank])
        batches = batches[self.blank :]
        if self.pool is None:
            loaded: Iterable[Any] = _loader(self.dataset, _Batches(batches), default_collate)
        else:
            loaded = self.pool.load(self.index, batches)
        for batch, size in zip(chain(blank, loaded), self.batches.sizes[done:], strict=True):
            yield self.finish(batch if size else [column[:0] for column in batch])

    def state_dict(self) -> dict[str, int]:
        """Return how many batches the next pass skips."""
        return {"batches": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next pass skip the first batches, as if they had been loaded."""
        self._done = state["batches"]


def copied(batch: Sequence[Any]) -> list[Any]:
    """Return ``batch`` with its images in memory of their own, pinned if CUDA is available."""
    images, *rest = batch
    return [images.pin_memory() if torch.cuda.is_available() else images.clone(), *rest]


class _Request(NamedTuple):
    """A batch that a worker is to load.

    Attributes:
        dataset: Index of the dataset to load from.
        items: What to load.
        buffer: Index of the buffer for the images; fresh memory if None.
    """

    dataset: int
    items: Sequence[Any]
    buffer: int | None


class _Loaded(NamedTuple):
    """The samples of a batch, and the index of the buffer for their images."""

    samples: Sequence[tuple[Any, ...]]
    buffer: int | None


class _Packed(NamedTuple):
    """A batch on its way from a worker.

    Attributes:
        buffer: Index of the buffer that holds the images; None if they are in fresh memory.
        images: Their shape, or the images themselves if they are in fresh memory.
        rest: The other columns of the batch.
    """

    buffer: int | None
    images: Tensor | torch.Size
    rest: Sequence[Sequence[Any]]


class _Datasets(Dataset[Any]):
    """Several datasets behind one interface."""

    def __init__(self, datasets: Sequence[Dataset[Any]]) -> None:
        self.datasets = datasets

    def __getitems__(self, request: _Request) -> _Loaded:
        dataset = self.datasets[request.dataset]
        many = getattr(dataset, "__getitems__", None)
        samples = [dataset[item] for item in request.items] if many is None else many(request.items)
        return _Loaded(samples, request.buffer)


class _Buffers:
    """Memory that workers share, reused for images in flight: the system clears fresh memory first.

    Args:
        number: Batches in flight at a time.
        size: Bytes for the images of each.

    Raises:
        OSError: If there is less shared memory.
    """

    def __init__(self, number: int, size: int) -> None:
        _require_shared_memory(number * size)
        self._memory = torch.empty(number, size, dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self._memory)

    def packed(self, loaded: _Loaded) -> _Packed:
        """Return the loaded samples as a batch; images of uint8 go into their buffer if they fit."""
        images, *rest = zip(*loaded.samples, strict=True)
        first = images[0]
        if loaded.buffer is not None and isinstance(first, Tensor) and first.dtype == torch.uint8:
            shape = torch.Size([len(images), *first.shape])
            if shape.numel() <= self._memory.shape[1]:
                torch.stack(images, out=self._view(loaded.buffer, shape))
                return _Packed(loaded.buffer, shape, rest)
        return _Packed(None, default_collate(list(images)), rest)

    def unpacked(self, packed: _Packed) -> list[Any]:
        """Return the batch, its images still in their buffer."""
        buffer, images, rest = packed
        tensor = images if isinstance(images, Tensor) else self._view(buffer, images)
        return [tensor, *(default_collate(list(column)) for column in rest)]

    def _view(self, buffer: int | None, shape: torch.Size) -> Tensor:
        images: Tensor = self._memory[buffer, : shape.numel()].view(shape)
        return images


def _require_shared_memory(size: int) -> None:
    """Refuse to allocate more shared memory than is free: some versions of torch crash on the attempt."""
    if os.path.isdir(_SHARED_MEMORY) and size > shutil.disk_usage(_SHARED_MEMORY).free:
        raise OSError(
            f"Loading batches in advance takes {size / 1e6:.0f} MB of shared memory, more than is free in "
            f"{_SHARED_MEMORY}: choose fewer --num_workers, a smaller --batch_size and --test_batch_size, or "
            "enlarge the folder (docker run --shm-size)."
        )


class _Batches(Sampler[Any]):
    """Yields the batches that are listed when it is iterated."""

    def __init__(self, listed: Iterable[Any] = ()) -> None:
        self.listed = listed

    def __iter__(self) -> Iterator[Any]:
        return iter(self.listed)


def _loader(
    dataset: Dataset[Any], batches: _Batches, collate: Callable[[Any], Any], **kwargs: Any
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        # A loader draws a seed for its workers when it is iterated. No draw of a sample depends on it, and
        # without a generator of its own the loader would draw from the global one.
        generator=torch.Generator(),
        **kwargs,
    )
