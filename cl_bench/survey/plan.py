"""The rows of a survey, the most valuable first, and what differs between the real one and its rehearsal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cl_bench.bench.options import PUBLISHED
from cl_bench.run.configs import Config, stems_of


@dataclass(frozen=True)
class Size:
    """How large the rows of a survey are.

    Attributes:
        name: As on the command line.
        vit: Settings of a check that replace those of the tiny transformer. ViT-B/16 sees images of 64
            pixels there, since the CPU has to keep up; rows of speed see 224.
        model: Backbone of the rows of speed and of the stream.
        image_size: Height and width of the images of the stream.
        batches: Numbers of images of a measured step; the last is the batch of the stream.
        rounds: How often each step is timed.
        compiler: Backend of torch.compile.
        classes: Classes of the stream of ten experiences.
        images: Training images of each of its classes.
        distinct: JPEGs that are drawn; all images are links to them.
        epochs: Epochs of an experience.
        loaders: Processes that load its images.
        workers: Processes that check strategies at the same time.
        timed: Whether nothing else runs beside a row of speed; a rehearsal has no times worth keeping.
    """

    name: str
    vit: Config
    model: Config
    image_size: int
    batches: Sequence[int]
    rounds: int
    compiler: str
    classes: int
    images: int
    distinct: int
    epochs: int
    loaders: int
    workers: int
    timed: bool

    @property
    def test_images(self) -> int:
        """Test images of each class of the stream, a quarter of the training images."""
        return max(1, self.images // 4)


_SMALL = {"img_size": 32, "patch_size": 16, "embed_dim": 120, "depth": 6, "num_heads": 3}  # CODA needs 100
_CORES = os.cpu_count() or 1

SIZES = {
    "full": Size(
        name="full",
        vit={"backbone.model": "vit_base_patch16_224", "backbone.options": {"img_size": 64}}
        | {"data.image_size": 64},
        model={"model": "vit_base_patch16_224"},
        image_size=224,
        batches=(128, 256),
        rounds=6,
        compiler="inductor",
        classes=200,
        images=120,
        distinct=1_200,
        epochs=2,
        loaders=min(16, _CORES),
        workers=max(1, min(8, _CORES // 2)),
        timed=True,
    ),
    "rehearsal": Size(
        name="rehearsal",
        vit={"backbone.options": _SMALL, "data.image_size": 32},
        model={"model": "vision_transformer", "options": _SMALL},
        image_size=32,
        batches=(4, 8),
        rounds=1,
        compiler="eager",  # counts the same graphs; only their code is not generated
        classes=20,
        images=8,
        distinct=16,
        epochs=2,
        loaders=2,
        workers=2,
        timed=False,
    ),
}


@dataclass(frozen=True)
class Task:
    """One row to make.

    Attributes:
        name: Of the row.
        kind: What makes it, as :func:`cl_bench.survey.worker.made` names it.
        arguments: Arguments of that function.
        seconds: Time after which its process is killed.
        alone: Whether it is timed, so that nothing else may run.
    """

    name: str
    kind: str
    arguments: dict[str, Any]
    seconds: float
    alone: bool = False


def plan(size: Size, device: str) -> list[Task]:
    """Return the rows of a survey in the order in which they are made."""
    stems, of_size = stems_of("strategies"), {"size": size, "device": device}

    def checks(transformer: str, settings: Config, seconds: float) -> list[Task]:
        of_all = {"settings": settings, "device": device}
        return [Task(f"{transformer}/{stem}", "check", {"stem": stem} | of_all, seconds) for stem in stems]

    def steps(stem: str, compiled: bool, seconds: float) -> Task:
        arguments = {"stem": stem, "compiler": size.compiler if compiled else None} | of_size
        name = f"{'compiled' if compiled else 'eager'}/{stem}"
        return Task(name, "steps", arguments, seconds, alone=size.timed)

    return [
        *checks("tiny", {}, 60),
        *(steps(stem, False, 60) for stem in PUBLISHED),
        Task("stream/imagenet_r", "stream", of_size, 150, alone=size.timed),
        Task("stream/loading", "loading", of_size, 90, alone=size.timed),
        steps("lora", True, 150),
        *checks("vit", size.vit, 120),
        *(
            Task(f"graphs/{stem}", "graphs", {"stem": stem, "compiler": size.compiler, "device": device}, 90)
            for stem in stems
        ),
        *(steps(stem, True, 150) for stem in PUBLISHED if stem != "lora"),
        *(steps(stem, False, 60) for stem in stems if stem not in PUBLISHED),
    ]
