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
from cl_bench.data.loading import WorkerPool, copied
from cl_bench.data.stream import Transform
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.network.backbones import Backbone
from datamodules.toy import Toy
from strategies.linear_probe import LinearProbe

WORKERS = 2


class Signed(Dataset[Any]):
    """Each item times ten, with the process that loaded it."""

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        return torch.tensor([10 * item]), worker()


def worker() -> int:
    pid = multiprocessing.current_process().pid
    assert pid is not None
    return pid


def items(batches: Iterator[Any]) -> tuple[list[int], set[int]]:
    """All items of the batches, and the processes that loaded them."""
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


def test_an_abandoned_pass_leaves_the_pool_to_the_next(pool: WorkerPool) -> None:
    processes = items(pool.load(0, BATCHES))[1]
    abandoned = pool.load(0, BATCHES)
    next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]
    assert items(pool.load(1, [[5], [6]])) == ([50, 60], processes)


def test_a_pass_has_ended_after_its_last_batch(pool: WorkerPool) -> None:
    first, second = pool.load(0, BATCHES), pool.load(1, BATCHES)
    processes = {pid for _ in BATCHES for pid in next(first)[1].tolist()}
    began = next(second)
    first.close()  # type: ignore[attr-defined]
    inner, inner_processes = items(pool.load(0, [[7]]))
    rest, outer_processes = items(second)
    assert (began[0].flatten().tolist() + rest, inner) == ([0, 10, 20, 30, 40], [70])
    assert outer_processes <= processes
    assert inner_processes.isdisjoint(processes)


def test_an_error_in_a_worker_is_raised_here_and_the_next_pass_is_complete(pool: WorkerPool) -> None:
    with pytest.raises(ValueError, match="no item 3"):
        list(pool.load(2, [[3]]))
    assert items(pool.load(1, BATCHES))[0] == [0, 10, 20, 30, 40]
    assert list(pool.load(1, [])) == []
    assert items(pool.load(1, BATCHES))[0] == [0, 10, 20, 30, 40]


class Whole(Dataset[Any]):
    """Images (3, 2, 2) of uint8, filled with the item."""

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        return torch.full((3, 2, 2), item, dtype=torch.uint8), item


class Fractional(Dataset[Any]):
    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        return torch.full((3, 2, 2), item / 2), item


class Late(Dataset[Any]):
    """The same images, slowly."""

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        time.sleep(0.02)
        return Whole()[item]


class Arrays(Dataset[Any]):
    """The same images as arrays, not tensors."""

    def __getitem__(self, item: int) -> tuple[Any, int]:
        return Whole()[item][0].numpy(), item


PAIRS = [[first, first + 1] for first in range(0, 24, 2)]


@pytest.fixture
def image_pool() -> Iterator[WorkerPool]:
    """A pool with shared memory for pairs of images."""
    opened = WorkerPool([Whole(), Fractional(), Late(), Arrays()], WORKERS, image_bytes=2 * 3 * 2 * 2)
    yield opened
    opened.close()


def test_images_of_uint8_travel_in_reused_shared_memory(image_pool: WorkerPool) -> None:
    loaded: list[Tensor] = []
    for _ in range(2):
        for (images, items), pair in zip(image_pool.load(0, PAIRS), PAIRS, strict=True):
            assert items.tolist() == pair
            assert images[:, 0, 0, 0].tolist() == pair
            loaded.append(images)  # so that its memory cannot be given to another tensor
    assert all(images.is_shared() for images in loaded)
    # Each worker loads two batches in advance, and one batch is in use.
    assert len({images.data_ptr() for images in loaded}) == 2 * WORKERS + 1


def test_a_batch_does_not_change_until_the_next_is_requested(image_pool: WorkerPool) -> None:
    loaded = image_pool.load(0, PAIRS)
    images, _ = next(loaded)
    time.sleep(0.2)  # the workers load as far ahead as they may
    assert images[:, 0, 0, 0].tolist() == PAIRS[0]
    later = [copied(batch) for batch in loaded]
    assert [batch[0][:, 0, 0, 0].tolist() for batch in later] == PAIRS[1:]


def test_an_abandoned_pass_leaves_no_image_in_the_next(image_pool: WorkerPool) -> None:
    abandoned = image_pool.load(2, [[100 + item for item in pair] for pair in PAIRS])
    next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]
    assert [images[:, 0, 0, 0].tolist() for images, _ in image_pool.load(0, PAIRS)] == PAIRS


@pytest.mark.parametrize(("dataset", "pair"), [(1, [1, 2]), (0, [1, 2, 3]), (3, [1, 2])])
def test_floats_and_larger_batches_come_in_memory_of_their_own(
    image_pool: WorkerPool, dataset: int, pair: list[int]
) -> None:
    kept = list(image_pool.load(dataset, [pair] * 12))
    values = torch.tensor(pair) / 2 if dataset == 1 else torch.tensor(pair)
    assert all(torch.equal(images[:, 0, 0, 0], values) for images, _ in kept)
    assert len({images.data_ptr() for images, _ in kept}) == 12


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no folder of shared memory here")
def test_too_little_shared_memory_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: _Usage(64_000_000))
    WorkerPool([Whole()], WORKERS, image_bytes=64_000_000 // 5).close()
    with pytest.raises(OSError, match=r"takes 100 MB of shared memory, .* choose fewer --num_workers"):
        WorkerPool([Whole()], WORKERS, image_bytes=20_000_000)


class _Usage(NamedTuple):
    free: int


class SigningTransform:
    """Fills an image with the id of the worker that loads it; with 0 outside a worker."""

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


class Recording(LinearProbe):
    """Records which processes loaded the images of its data passes."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
        self.processes: list[set[int]] = []

    def before_training(self, data: TrainingData) -> None:
        self.record(*(images for images, _ in data.augmented()))

    def after_training(self, data: TrainingData) -> None:
        self.record(*(images for images, _ in data.plain()))

    def record(self, *images: Tensor) -> None:
        self.processes.append(set(torch.cat(images).unique().int().tolist()))


class RecordingBatches(Callback):
    """Records which processes loaded the images of training and evaluation."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Recording)
        pl_module.record(batch[0])

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, Recording)
        pl_module.record(batch[0])


def test_workers_outlive_passes_epochs_tests_and_experiences() -> None:
    tiny = dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1)
    strategy = Recording(Backbone("vision_transformer", weights="random", options=tiny))
    data = SignedToy(num_experiences=3, num_workers=WORKERS, batch_size=6)
    StreamTrainer(max_epochs=2, accelerator="cpu", callbacks=[RecordingBatches()]).run(strategy, data)
    everyone = set().union(*strategy.processes)
    assert len(strategy.processes) > 3 * (2 + 2 * 4 + 1)
    assert len(everyone) == WORKERS
    assert worker() not in everyone


def test_a_finished_run_leaves_no_process_behind() -> None:
    tiny = dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1)
    before = {child.pid for child in multiprocessing.active_children()}
    data = SignedToy(num_experiences=2, num_workers=WORKERS)
    strategy = Recording(Backbone("vision_transformer", weights="random", options=tiny))
    StreamTrainer(max_epochs=1, accelerator="cpu").run(strategy, data)
    assert {child.pid for child in multiprocessing.active_children()} <= before
