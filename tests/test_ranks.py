"""One run in two real processes against the same run in one; this file is also the command of the two."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_bench.backbones import Backbone
from cl_bench.diagnostics import Diagnostics
from cl_bench.ranks import is_first
from cl_bench.strategy import Strategy
from cl_bench.trainer import StreamTrainer
from datamodules.toy import Toy
from strategies.inflora import InfLoRA
from strategies.janus_lora import JanusLoRA
from strategies.keeplora import KeepLoRA
from strategies.loda import LoDA
from strategies.lora import LoRA
from strategies.lora_gpm import LoRAGPM
from strategies.ncm import NearestClassMean


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


WATCHED = "LoRA with diagnostics"
STRATEGIES: dict[str, Callable[[Backbone], Strategy]] = {
    "LoRA": lambda backbone: LoRA(backbone, rank=2),
    "LoRA-GPM": lambda backbone: LoRAGPM(backbone, rank=2, threshold=0.8),
    "InfLoRA": lambda backbone: InfLoRA(backbone, rank=2, threshold=0.8),
    "KeepLoRA": lambda backbone: KeepLoRA(backbone, rank=2, feature_threshold=0.8),
    "KeepLoRA as released": lambda backbone: KeepLoRA(backbone, rank=2, input_statistic="batch_average"),
    "JANUS-LoRA": lambda backbone: JanusLoRA(backbone, rank=2, threshold=0.8),
    "JANUS-LoRA with triplets": lambda backbone: JanusLoRA(
        backbone, rank=2, threshold=0.8, estimate_every=3, margin_loss="triplet"
    ),
    "LoDA": lambda backbone: LoDA(backbone, rank=2),
    "NCM": NearestClassMean,
    WATCHED: lambda backbone: LoRA(backbone, rank=2, optimizer=sgd),
}


def outcome(name: str, **arguments: Any) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
    """Return state, rows and diagnostics of a run; the last batch of every epoch is a single image."""
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    backbone = Backbone("vision_transformer", "random", options, "half")
    # Rounding must not grow into another decision, so all is done in double precision; diagnostics are not.
    how: dict[str, Any] = {"callbacks": [Diagnostics()]} if name == WATCHED else {"precision": "64-true"}
    trainer = StreamTrainer(max_epochs=2, accelerator="cpu", **how, **arguments)
    strategy = STRATEGIES[name](backbone)
    data = Toy(num_classes=8, held_out_classes=2, num_experiences=3, image_size=8, seed=1, batch_size=23)
    result = trainer.run(strategy, data)
    state = {name: value for name, value in strategy.state_dict().items() if isinstance(value, Tensor)}
    return state, result.rows, result.diagnostics


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name in STRATEGIES:
        found = outcome(name, devices=2, strategy="ddp", check_agreement=True)
        if is_first():
            torch.save(found, folder / f"{name}.pt")


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_learn_and_count_what_one_does(of_two: Path, name: str) -> None:
    state, rows, diagnostics = torch.load(of_two / f"{name}.pt", weights_only=False)
    expected, expected_rows, expected_diagnostics = outcome(name)
    assert rows == expected_rows
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        found = state[key]
        assert found.shape == tensor.shape, key
        if key.startswith("memory."):  # the signs of a basis are chance
            found, tensor = found @ found.mT, tensor @ tensor.mT
        assert torch.allclose(found, tensor, rtol=0, atol=_rounding(name, key)), key
    assert len(diagnostics) == len(expected_diagnostics)
    for one, other in zip(diagnostics, expected_diagnostics, strict=True):
        assert one.keys() == other.keys()
        assert numbers(one) == pytest.approx(numbers(other), rel=1e-4, abs=1e-6)


def _rounding(name: str, key: str) -> float:
    if key.endswith("isolated.A"):  # of directions whose ratio of energies hardly differs, any will do
        return 1e-3
    # Memories are kept in single precision, and so are the moments of online estimation.
    return 2e-6


def numbers(entry: Any) -> list[float]:
    """Every number of a diagnostic; lists of images are sorted, as their order is that of the processes."""
    if isinstance(entry, dict):
        return [number for value in entry.values() for number in numbers(value)]
    if isinstance(entry, list):
        return sorted(number for value in entry for number in numbers(value))
    return [] if entry is None else [float(entry)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
