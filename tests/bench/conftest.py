"""Strategies on a transformer of two blocks, in the middle of a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cl_bench.bench.subject import Setup, Subject
from cl_bench.data.experience import Batch
from cl_bench.run.run import quiet


@pytest.fixture
def subject(tmp_path: Path) -> Callable[..., Subject]:
    """Makes a subject whose batches have four images."""

    def made(stem: str, number: int = 2, precision: str = "32-true", compiler: str | None = None) -> Subject:
        options = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
        backbone = {"model": "vision_transformer", "weights": "random", "options": options}
        setup = Setup(
            backbone | {"compiler": compiler}, 16, torch.device("cpu"), [precision], [4], 1, tmp_path
        )
        with quiet():
            return Subject(stem, number, precision, setup)

    return made


@pytest.fixture
def during() -> Callable[[Subject, Callable[[], None]], None]:
    """Calls a function before the first of two steps of a subject."""

    def called(subject: Subject, function: Callable[[], None]) -> None:
        calls: list[str] = []

        def steps() -> Iterator[Batch]:
            function()
            calls.append("once")
            yield subject.stream.batch(4)
            yield subject.stream.batch(4)

        with quiet():
            subject.run(steps())
        assert calls == ["once"]

    return called
