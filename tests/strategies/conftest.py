"""A walk through a tiny stream that remembers of each experience what strategies claim something about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cl_bench.contracts.strategy import Strategy
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.maths.memory import GPM
from cl_bench.network.backbones import Backbone
from cl_bench.results.result import Result
from datamodules.toy import Toy


@dataclass
class Learnt:
    """One experience: what it started from and what it did.

    Attributes:
        weights: Weights with all adapters in them, float64, before the method measured anything.
        bases: What the memory protected then.
        started: Weights with all adapters in them at the first step.
        down: Down-projections at the first step, by adapter.
        down_at_end: Down-projections after the last step.
        updates: What all steps did to the weights.
    """

    weights: list[Tensor]
    bases: list[Tensor]
    started: list[Tensor] = field(default_factory=list)
    down: list[dict[str, Tensor]] = field(default_factory=list)
    down_at_end: list[dict[str, Tensor]] = field(default_factory=list)
    updates: list[Tensor] = field(default_factory=list)


class Walk(Callback):
    """What happened on the way, and where it ended.

    Attributes:
        learnt: One entry for each experience.
        result: The result of the stream.
        losses: The training loss of every step.
        trainable: Number of trained parameters in each experience.
    """

    def __init__(self) -> None:
        self.learnt: list[Learnt] = []
        self.losses: list[float] = []
        self.trainable: list[int] = []
        self.result: Result

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.learnt.append(Learnt(_weights(pl_module), _bases(pl_module)))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.learnt[-1].down:
            self.learnt[-1].started = _weights(pl_module)
            self.learnt[-1].down = _down(pl_module)
            assert isinstance(pl_module, Strategy)
            self.trainable.append(pl_module.trainable_parameters)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.learnt[-1].down_at_end = _down(pl_module)
        # Taken before merging, which rounds an update to the digits of the weight.
        before = self.learnt[-1].weights
        self.learnt[-1].updates = [
            after - old for after, old in zip(_weights(pl_module), before, strict=True)
        ]


def _layers(module: Any) -> Any:
    return getattr(module, "layers", [])


def _weights(module: Any) -> list[Tensor]:
    """Return weights with the products of their adapters, in float64, which rounds neither away."""
    found = []
    for layer in _layers(module):
        weight = layer.weight.detach().double()
        for name, rows in layer.rows.items():
            adapter = layer.adapter(name)
            weight[rows] += adapter.scale * (adapter.B.double() @ adapter.A.double()).detach()
        found.append(weight)
    return found


def _down(module: Any) -> list[dict[str, Tensor]]:
    return [
        {name: layer.adapter(name).A.detach().clone() for name in layer.rows} for layer in _layers(module)
    ]


def _bases(module: Any) -> list[Tensor]:
    memory = getattr(module, "memory", None)
    return [memory.basis(i).clone() for i in range(memory.num_layers)] if isinstance(memory, GPM) else []


def _backbone(depth: int = 2) -> Backbone:
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": depth, "num_heads": 2}
    return Backbone("vision_transformer", "random", options, "half")


@pytest.fixture
def backbone() -> Callable[..., Backbone]:
    """Makes a backbone of two blocks, 32 wide."""
    return _backbone


@pytest.fixture
def walk() -> Callable[..., Walk]:
    """Takes a strategy through three experiences of two classes each."""

    def through(strategy: Strategy, *, max_epochs: int = 2, seed: int = 1, **changes: Any) -> Walk:
        arguments = {"num_classes": 6, "num_experiences": 3, "image_size": 16, "batch_size": 8, "seed": seed}
        walked = Walk()
        trainer = StreamTrainer(max_epochs=max_epochs, accelerator="cpu", callbacks=[walked])
        walked.result = trainer.run(strategy, Toy(**arguments | changes))
        return walked

    return through
