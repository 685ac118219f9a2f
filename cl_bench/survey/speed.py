"""Rows that measure: steps against the floor, compiled code, loading, and a stream of ImageNet-R's shape."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch._dynamo.utils import counters

from cl_bench.bench.command import EARLY, add_shares, measurements
from cl_bench.bench.floor import Unmeasurable
from cl_bench.bench.subject import RECIPES, Setup
from cl_bench.contracts.photographs import PhotographFiles
from cl_bench.data.experience import Batch
from cl_bench.data.sources import FileSource, Sources
from cl_bench.loop.provenance import provenance
from cl_bench.run.configs import CONFIGS, Config, config_file, load
from cl_bench.run.configuration import Configuration, resolve
from cl_bench.run.run import run
from cl_bench.survey.plan import Size
from cl_bench.survey.worker import Found

_PRECISION = "bf16-mixed"
_PUBLISHED_EPOCHS = 50
_EXPERIENCES = 10
_SIDES = 500, 375  # pixels, as a photograph of ImageNet-R


class Pictures(PhotographFiles):
    """Generated JPEGs below ``root``, a folder for each class in ``train`` and in ``test``.

    Args:
        held: Whether an epoch repeats its first batch, so that nothing is loaded while it trains.
        kwargs: As in every dataset of photographs.
    """

    name = "pictures"

    def __init__(self, *, held: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.held = held

    def sources(self) -> Sources:
        """Find the pictures."""
        root = Path(self.root)
        names = sorted(folder.name for folder in (root / "train").iterdir())
        splits = {}
        for split in ("train", "test"):
            files = sorted(path.relative_to(root).as_posix() for path in (root / split).rglob("*.jpg"))
            splits[split] = FileSource(root, files, [names.index(file.split("/")[1]) for file in files])
        return Sources(splits["train"], splits["test"], class_names=names)

    def train_dataloader(self) -> Any:
        """Serve the training images of the experience, or as many batches of the same images."""
        loader = super().train_dataloader()
        return _Held(next(iter(loader)), len(loader)) if self.held else loader


class _Held:
    """A loader of ``number`` times the same batch."""

    def __init__(self, batch: Batch, number: int) -> None:
        self._batches = [batch] * number

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


def draw(root: Path, size: Size) -> None:
    """Draw clouds under a little noise, files about as large as photographs, unless ``root`` has them."""
    drawn = root.with_name("drawn")
    drawn.mkdir(exist_ok=True)

    def one(index: int) -> None:
        generator = np.random.RandomState(index)
        clouds = Image.fromarray(generator.randint(256, size=(24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(clouds.resize(_SIDES, Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + generator.randint(-12, 13, size=smooth.shape, dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(drawn / f"{index}.jpg", quality=90)

    with ThreadPoolExecutor(size.loaders) as pool:
        list(pool.map(one, (i for i in range(size.distinct) if not (drawn / f"{i}.jpg").exists())))
    number = 0
    for split, images in (("train", size.images), ("test", size.test_images)):
        for label in range(size.classes):
            folder = root / split / f"{label:03}"
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(images):
                if not (link := folder / f"{index:03}.jpg").exists():
                    os.link(drawn / f"{number % size.distinct}.jpg", link)
                number += 1


def setup(size: str, device: str) -> Found:
    """Return what is surveyed.

    Raises:
        ValueError: If PyTorch sees no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch sees no CUDA device here: choose --device cpu, or install its CUDA build.")
    made = provenance(torch.device(device))
    kept = {key: made[key] for key in ("device", "commit", "python")}
    return kept | {"size": size, "torch": made["versions"]["torch"], "cores": os.cpu_count()}


def steps(stem: str, compiler: str | None, size: Size, device: str) -> Found:
    """Measure training steps of one strategy in bf16 against the floor, as the bench does."""
    counters.clear()
    backbone = size.model | {"weights": "random", "compiler": compiler}
    where = torch.device(device), [_PRECISION], size.batches, size.rounds
    # After a change of size, torch would compile once for all sizes, and that would be timed instead.
    each_size = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
    with TemporaryDirectory() as name, each_size:
        try:
            rows = measurements(stem, EARLY, _PRECISION, Setup(backbone, size.image_size, *where, Path(name)))
        except Unmeasurable as error:
            return {"steps": None, "reasons": {"steps": str(error)}}
    rates = add_shares(rows)
    keys = ("images_per_s", "of_matrix_rate", "ratio_to_floor", "peak_bytes")
    return {
        "steps": {
            str(row["batch"]): {key: row[key] for key in keys} for row in rows if row["name"] == "step"
        },
        "matrix_tflops": rates[_PRECISION] / 1e12,
        "graphs": counters["stats"]["unique_graphs"],
    }


def stream(size: Size, device: str, folder: Path) -> Found:
    """Run LoRA on a stream of the shape of ImageNet-R, and extrapolate to the published epochs."""
    result = run(_configuration(size, device, folder))
    spent = {
        name: sum(cost.seconds.get(name, 0.0) for cost in result.costs) for name in result.costs[0].seconds
    }
    images = size.classes * size.images * size.epochs
    rest = sum(spent.values()) - spent["training"]
    return {
        "training_images_per_s": images / spent["training"],
        "run_seconds": spent["training"] + rest,
        "published_seconds": spent["training"] * _PUBLISHED_EPOCHS / size.epochs + rest,
        "spent": spent,
        "peak_bytes": result.costs[-1].peak_memory_bytes if device == "cuda" else None,
        "reasons": {} if device == "cuda" else {"peak_bytes": "Only CUDA reports it."},
    }


def loading(size: Size, device: str, folder: Path) -> Found:
    """Measure how fast the loader delivers, and how long training waits for it.

    Training on real batches is compared with training on one batch that is there already.
    """
    seconds = {}
    for held in (True, False):
        configuration = _configuration(size, device, folder, held=held)
        data = configuration.datamodule
        strategy, trainer = configuration.build([], [])
        trainer.require_fit(strategy, data)
        for experience in data.experiences[:2]:  # the first starts the loaders and warms up
            trainer.learn(strategy, data, experience)
        seconds[held] = trainer.course.seconds["training"]
        if not held:
            alone = _seconds(data.train_dataloader())
        data.close()
    images = size.classes // _EXPERIENCES * size.images
    return {
        "loader_images_per_s": images / alone,
        "training_images_per_s": images * size.epochs / seconds[False],
        "waiting": max(0.0, 1 - seconds[True] / seconds[False]),
    }


def _seconds(batches: Iterable[Batch]) -> float:
    """Return how long one pass takes."""
    began = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - began


def _configuration(size: Size, device: str, folder: Path, held: bool = False) -> Configuration:
    """Return LoRA with its published settings on the generated pictures, with decoded images cached."""
    root = folder / "pictures"
    data = {"root": str(root), "cache": "pixels", "num_workers": size.loaders, "held": held}
    data |= {"num_experiences": _EXPERIENCES, "image_size": size.image_size, "batch_size": size.batches[0]}
    given: Config = {
        "data": {"class_path": f"{__name__}.Pictures", "init_args": data},
        "backbone": size.model | {"weights": "random", "normalisation": "unit"},
        "trainer": {
            "max_epochs": size.epochs,
            "precision": _PRECISION,
            "accelerator": "gpu" if device == "cuda" else "cpu",
        },
    }
    recipe: Config = {"model": load(RECIPES / "lora.yaml")["model"]}
    lora = config_file("strategies", "lora")
    layers: list[Path | Config] = [CONFIGS / "trainer.yaml", lora, recipe, given]
    words = [f"--results={folder / 'results'}", f"--threads={torch.get_num_threads()}"]
    words += ["--model.scheduler=null"]  # a schedule spans the published epochs
    with FileLock(folder / "pictures.lock"):
        draw(root, size)
        configuration = resolve(layers, words)
        configuration.datamodule.setup()
    return configuration
