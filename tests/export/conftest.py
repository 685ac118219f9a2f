"""Cells of toy that were run once and have kept everything."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from cl_bench.run.configuration import Configuration, layers, resolve
from cl_bench.run.run import quiet, run


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Configuration]:
    """Runs a cell of a method on toy with ``--keep all --keep_logits``, once for equal words."""
    folder = tmp_path_factory.mktemp("kept")

    @cache
    def ran(method: str, *words: str) -> Configuration:
        keep = [f"--results={folder}", "--trainer.accelerator=cpu", "--keep=all", "--keep_logits=true"]
        configuration = resolve(layers(method, "toy"), [*keep, *words])
        with quiet():
            run(configuration)
        return configuration

    return ran


@pytest.fixture(scope="session")
def checkout_of_a_cell(kept: Callable[..., Configuration]) -> Path:
    """Folder of a finished cell of LoRA."""
    return kept("lora", "--rank=2").folder
