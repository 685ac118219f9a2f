"""Images a second, ours over those of a bare loop in the same run: a busy machine slows both."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from cl_bench.contracts.photographs import PhotographFiles
from cl_bench.data.cache import CacheKind
from cl_bench.data.sources import FileSource, Sources

pytestmark = pytest.mark.soak

IMAGES = 512
ROUNDS = 5
PROCESSES = 2

TRAIN = transforms.Compose(
    [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
)
TEST = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()])


class Pictures(PhotographFiles):
    """The same pictures for training and for testing, as two classes."""

    name = "pictures"

    def sources(self) -> Sources:
        root = Path(self.root)
        files = sorted(path.name for path in root.glob("*.jpg"))
        source = FileSource(root, files, [place % 2 for place in range(len(files))])
        return Sources(source, source, ["even", "odd"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 500 × 375 pixels, clouds under a little noise: files about as large as photographs."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.RandomState(0)
    for index in range(IMAGES):
        clouds = Image.fromarray(generator.randint(256, size=(24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(clouds.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + generator.randint(-12, 13, size=smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / f"{index:04}.jpg", quality=90)
    return root


def bare(
    paths: list[Path], transform: Callable[[Any], torch.Tensor], beginning: Barrier, end: Barrier
) -> None:
    torch.set_num_threads(1)  # as every process of a DataLoader
    beginning.wait()
    for path in paths:
        with Image.open(path) as image:
            transform(image.convert("RGB"))
    end.wait()


def bare_seconds(pictures: Path, transform: Callable[[Any], torch.Tensor]) -> float:
    """Seconds of a bare loop over all pictures, in one process a core, each with its share of them.

    The processes start before the clock does, like our workers.
    """
    paths = sorted(pictures.glob("*.jpg"))
    context = multiprocessing.get_context("fork")
    beginning, end = context.Barrier(PROCESSES + 1), context.Barrier(PROCESSES + 1)
    children = [
        context.Process(target=bare, args=(paths[place::PROCESSES], transform, beginning, end))
        for place in range(PROCESSES)
    ]
    for child in children:
        child.start()
    beginning.wait()
    began = time.perf_counter()
    end.wait()
    seconds = time.perf_counter() - began
    for child in children:
        child.join()
    return seconds


def our_seconds(data: Pictures, view: str) -> float:
    """Seconds of one pass with workers that have started already."""
    loader = data.train_dataloader() if view == "train" else data.test_dataloader()
    began, count = time.perf_counter(), 0
    for batch in loader:
        count += len(batch[1])
    assert count == IMAGES
    return time.perf_counter() - began


def test_the_next_experience_starts_no_process(pictures: Path) -> None:
    data = Pictures(
        root=str(pictures),
        num_experiences=2,
        num_workers=PROCESSES,
        batch_size=2,
        test_batch_size=2,
        cache="pixels",
    )
    data.setup()
    waited = []
    for experience in data.experiences:
        data.enter(experience)
        for loader in (data.train_dataloader(), data.plain_dataloader()):
            began = time.perf_counter()
            batches = iter(loader)
            next(batches)
            waited.append(time.perf_counter() - began)
            assert len(list(batches)) == IMAGES // 4 - 1
    print(f"first batch after {', '.join(f'{1000 * seconds:.0f} ms' for seconds in waited)}")
    assert max(waited[1:]) < waited[0] / 2


@pytest.mark.parametrize(
    ("view", "cache", "least"),
    [
        ("train", "none", 1.0),
        ("test", "none", 1.0),
        ("train", "pixels", 2.5),
        ("test", "pixels", 4.0),
        ("train", "jpeg", 1.0),
        ("test", "jpeg", 1.0),
    ],
)
def test_images_a_second_against_a_bare_loop(
    pictures: Path, view: str, cache: CacheKind, least: float
) -> None:
    data = Pictures(
        root=str(pictures),
        num_experiences=1,
        num_workers=PROCESSES,
        batch_size=32,
        test_batch_size=32,
        cache=cache,
    )
    data.setup()
    data.enter(data.experiences[0])
    our_seconds(data, view)
    ratios = []
    for _ in range(ROUNDS):
        theirs = bare_seconds(pictures, TRAIN if view == "train" else TEST)
        ours = our_seconds(data, view)
        ratios.append(theirs / ours)
    load = os.getloadavg()[0]
    print(
        f"{view} views, cache {cache}: {IMAGES / ours:.0f} images a second, bare loop "
        f"{IMAGES / theirs:.0f}; ratios {', '.join(f'{ratio:.2f}' for ratio in ratios)}; load {load:.1f}"
    )
    assert sorted(ratios)[ROUNDS // 2] >= least
