"""Strategies on a transformer of two blocks, in the middle of a stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cl_bench.bench.subject import Subject
from cl_bench.run.configs import Config
from cl_bench.run.run import quiet


@pytest.fixture
def backbone() -> Config:
    """The arguments of that transformer."""
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    return {"model": "vision_transformer", "weights": "random", "options": options}


@pytest.fixture
def subject(tmp_path: Path, backbone: Config) -> Callable[..., Subject]:
    """Makes a subject that waits before its first step."""

    def made(stem: str, number: int = 2, precision: str = "32-true", compiler: str | None = None) -> Subject:
        with quiet():
            return Subject(
                stem,
                number,
                backbone=backbone | {"compiler": compiler},
                trainer={"precision": precision, "accelerator": "cpu"},
                stream={"image_size": 16, "batch_size": 4},
                images=4,
                folder=tmp_path,
            )

    return made
