from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from cl_bench.contracts.strategy import TrainingData
from cl_bench.data.loading import WorkerPool, collate, copied
from cl_bench.data.regions import Region, Regions
from cl_bench.data.stream import Transform
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.network.backbones import Backbone
from datamodules.toy import Toy
from strategies.linear_probe import LinearProbe

WORKERS = 2


class Signed(Dataset[Any]):
    """Items ten times themselves, with the process that loaded them."""

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        return torch.tensor([10 * item]), worker()


def worker() -> int:
    pid = multiprocessing.current_process().pid
    assert pid is not None
    return pid


def items(batches: Iterator[Any]) -> tuple[list[int], set[int]]:
    """The items of all batches, and the processes that loaded them."""
    found: list[int] = []
    processes: set[int] = set()
    for values, pids in batches:
        found += values.flatten().tolist()
        processes |= set(pids.tolist())
    return found, processes


BATCHES = [[0, 1], [2, 3], [4]]


class Breaking(Dataset[Any]):
    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        raise ValueError(f"no item {item}")


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    opened = WorkerPool([Signed(), Signed(), Breaking()], WORKERS)
    yield opened
    opened.close()


def test_every_pass_is_loaded_by_the_same_processes(pool: WorkerPool) -> None:
    first, second = items(pool.load(0, BATCHES)), items(pool.load(1, BATCHES))
    assert first == second
    assert first[0] == [0, 10, 20, 30, 40]
    assert len(first[1]) == WORKERS
    assert worker() not in first[1]


def test_a_pass_within_a_pass_has_processes_of_its_own(pool: WorkerPool) -> None:
    outer = pool.load(0, BATCHES)
    began = next(outer)
    inner, inner_processes = items(pool.load(1, [[7, 8]]))
    rest, outer_processes = items(outer)
    assert inner == [70, 80]
    assert began[0].flatten().tolist() + rest == [0, 10, 20, 30, 40]
    assert inner_processes.isdisjoint(outer_processes)


def test_a_pass_that_is_given_up_leaves_the_pool_to_the_next(pool: WorkerPool) -> None:
    processes = items(pool.load(0, BATCHES))[1]
    given_up = pool.load(0, BATCHES)
    next(given_up)
    given_up.close()  # type: ignore[attr-defined]
    assert items(pool.load(1, [[5], [6]])) == ([50, 60], processes)


def test_a_pass_that_was_not_asked_for_its_end_has_ended(pool: WorkerPool) -> None:
    first, second = pool.load(0, BATCHES), pool.load(1, BATCHES)
    processes = {pid for _ in BATCHES for pid in next(first)[1].tolist()}
    began = next(second)
    first.close()  # type: ignore[attr-defined]
    inner, inner_processes = items(pool.load(0, [[7]]))
    rest, outer_processes = items(second)
    assert (began[0].flatten().tolist() + rest, inner) == ([0, 10, 20, 30, 40], [70])
    assert outer_processes <= processes
    assert inner_processes.isdisjoint(processes)


def test_an_error_in_a_process_is_raised_here_and_the_next_pass_is_whole(pool: WorkerPool) -> None:
    with pytest.raises(ValueError, match="no item 3"):
        list(pool.load(2, [[3]]))
    assert items(pool.load(1, BATCHES))[0] == [0, 10, 20, 30, 40]
    assert list(pool.load(1, [])) == []
    assert items(pool.load(1, BATCHES))[0] == [0, 10, 20, 30, 40]


class Whole(Dataset[Any]):
    """Images of 2 × 2 whole numbers, all equal to the item."""

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        return torch.full((3, 2, 2), item, dtype=torch.uint8), item


class Fractional(Dataset[Any]):
    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        return torch.full((3, 2, 2), item / 2), item


class Late(Dataset[Any]):
    """Images of whole numbers that take their time."""

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        time.sleep(0.02)
        return Whole()[item]


class Arrays(Dataset[Any]):
    """Images that are whole numbers, and no tensors."""

    def __getitem__(self, item: int) -> tuple[Any, int]:
        return Whole()[item][0].numpy(), item


class Cut(Dataset[Any]):
    """Regions of different sizes."""

    def __getitem__(self, item: int) -> tuple[Region, int]:
        return Region(torch.full((3, 1, 1 + item % 2), item, dtype=torch.uint8), item % 3 == 0), item


PAIRS = [[first, first + 1] for first in range(0, 24, 2)]


@pytest.fixture
def places() -> Iterator[WorkerPool]:
    opened = WorkerPool([Whole(), Fractional(), Cut(), Late(), Arrays()], WORKERS, image_bytes=2 * 3 * 2 * 2)
    yield opened
    opened.close()


def test_whole_numbers_travel_in_memory_that_is_used_again(places: WorkerPool) -> None:
    addresses: list[int] = []
    for _ in range(2):
        for (images, items), pair in zip(places.load(0, PAIRS), PAIRS, strict=True):
            assert items.tolist() == pair
            assert images[:, 0, 0, 0].tolist() == pair
            addresses.append(images.data_ptr())
    assert {*addresses} == {place.data_ptr() for place in places._places._shared}


def test_a_batch_stays_as_it_was_until_the_next_is_asked_for(places: WorkerPool) -> None:
    loaded = places.load(0, PAIRS)
    images, _ = next(loaded)
    time.sleep(0.2)  # the processes are as far ahead as they go
    assert images[:, 0, 0, 0].tolist() == PAIRS[0]
    later = [copied(batch) for batch in loaded]
    assert [batch[0][:, 0, 0, 0].tolist() for batch in later] == PAIRS[1:]


def test_a_pass_given_up_leaves_no_image_in_the_next(places: WorkerPool) -> None:
    given_up = places.load(3, [[100 + item for item in pair] for pair in PAIRS])
    next(given_up)
    given_up.close()  # type: ignore[attr-defined]
    assert [images[:, 0, 0, 0].tolist() for images, _ in places.load(0, PAIRS)] == PAIRS


@pytest.mark.parametrize(("dataset", "pair"), [(1, [1, 2]), (0, [1, 2, 3]), (4, [1, 2])])
def test_what_fits_no_place_comes_in_memory_of_its_own(
    places: WorkerPool, dataset: int, pair: list[int]
) -> None:
    kept = list(places.load(dataset, [pair] * 12))
    values = torch.tensor(pair) / 2 if dataset == 1 else torch.tensor(pair)
    assert all(torch.equal(images[:, 0, 0, 0], values) for images, _ in kept)
    assert len({images.data_ptr() for images, _ in kept}) == 12


def test_regions_travel_with_their_sizes(places: WorkerPool) -> None:
    for (regions, items), pair in zip(places.load(2, PAIRS), PAIRS, strict=True):
        expected, _ = collate([Cut()[item] for item in pair])
        assert isinstance(regions, Regions)
        assert regions.canvas.data_ptr() in {place.data_ptr() for place in places._places._shared}
        assert all(torch.equal(one, other) for one, other in zip(regions, expected, strict=True))
        assert items.tolist() == pair


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory is no folder here")
def test_more_shared_memory_than_there_is_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: _Usage(64_000_000))
    WorkerPool([Whole()], WORKERS, image_bytes=64_000_000 // 5).close()
    with pytest.raises(OSError, match=r"take 100 MB of shared memory, .* choose fewer --num_workers"):
        WorkerPool([Whole()], WORKERS, image_bytes=20_000_000)


class _Usage(NamedTuple):
    free: int


class SigningTransform:
    """Fills an image with the number of the process, if it is one of a loader."""

    def __call__(self, image: Tensor) -> Tensor:
        own = torch.utils.data.get_worker_info() is None
        return torch.full((3, 16, 16), 0.0 if own else float(worker()))

    def __repr__(self) -> str:
        return "SigningTransform()"


class SignedToy(Toy):
    def train_transform(self) -> Transform:
        return SigningTransform()

    def test_transform(self) -> Transform:
        return SigningTransform()


class Watching(LinearProbe):
    """Notes which processes loaded what it measures; it learns nothing from these numbers."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
        self.processes: list[set[int]] = []

    def before_training(self, data: TrainingData) -> None:
        self.note(*(images for images, _ in data.augmented()))

    def after_training(self, data: TrainingData) -> None:
        self.note(*(images for images, _ in data.plain()))

    def note(self, *images: Tensor) -> None:
        self.processes.append(set(torch.cat(images).unique().int().tolist()))


class Noting(Callback):
    """Notes which processes loaded what is trained and tested on."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Watching)
        pl_module.note(batch[0])

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, Watching)
        pl_module.note(batch[0])


def test_workers_outlive_passes_epochs_tests_and_experiences() -> None:
    tiny = dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1)
    strategy = Watching(Backbone("vision_transformer", weights="random", options=tiny))
    data = SignedToy(num_experiences=3, num_workers=WORKERS, batch_size=6)
    StreamTrainer(max_epochs=2, accelerator="cpu", callbacks=[Noting()]).run(strategy, data)
    everyone = set().union(*strategy.processes)
    assert len(strategy.processes) > 3 * (2 + 2 * 4 + 1)
    assert len(everyone) == WORKERS
    assert worker() not in everyone


def test_a_finished_run_leaves_no_process_behind() -> None:
    tiny = dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1)
    before = {child.pid for child in multiprocessing.active_children()}
    data = SignedToy(num_experiences=2, num_workers=WORKERS)
    strategy = Watching(Backbone("vision_transformer", weights="random", options=tiny))
    StreamTrainer(max_epochs=1, accelerator="cpu").run(strategy, data)
    assert {child.pid for child in multiprocessing.active_children()} <= before
