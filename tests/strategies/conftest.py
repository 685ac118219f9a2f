"""A walk through a tiny stream that records, for each experience, what strategies make claims about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cl_bench.contracts.low_rank import LowRankStrategy, memory_of
from cl_bench.contracts.strategy import Strategy
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.maths.memory import GPM
from cl_bench.network.backbones import Backbone
from cl_bench.results.result import Result
from datamodules.toy import Toy


@dataclass
class Learnt:
    """One experience: what it started from and what it did.

    Every list has one entry for each adapted projection.

    Attributes:
        weights: Weights with all adapters in them, float64, before the method measured anything.
        bases: What the memory protected then.
        started: Weights with all adapters in them at the first step.
        down: Down-projections at the first step.
        down_at_end: Down-projections after the last step.
        updates: What all steps together did to the weights.
    """

    weights: list[Tensor]
    bases: list[Tensor]
    started: list[Tensor] = field(default_factory=list)
    down: list[Tensor] = field(default_factory=list)
    down_at_end: list[Tensor] = field(default_factory=list)
    updates: list[Tensor] = field(default_factory=list)


class Walk(Callback):
    """What happened in each experience, and the result.

    Attributes:
        learnt: One entry for each experience.
        result: The result of the stream.
        losses: The training loss of every step.
    """

    def __init__(self) -> None:
        self.learnt: list[Learnt] = []
        self.losses: list[float] = []
        self.result: Result

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.learnt.append(Learnt(_weights(pl_module), _bases(pl_module)))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.learnt[-1].down:
            self.learnt[-1].started = _weights(pl_module)
            self.learnt[-1].down = _down(pl_module)

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


def _weights(strategy: Any) -> list[Tensor]:
    """Return weights with the products of their adapters, in float64, which rounds neither away."""
    if not isinstance(strategy, LowRankStrategy):
        return []
    found = []
    for layer in strategy.layers:
        weight = layer.weight.detach().double()
        for name, rows in layer.rows.items():
            adapter = layer.adapter(name)
            weight[rows] += (
                float(torch.as_tensor(adapter.scale).detach())
                * (adapter.B.double() @ adapter.A.double()).detach()
            )
        found.append(weight)
    return strategy.of_projections(found)


def _down(strategy: Any) -> list[Tensor]:
    adapters = strategy.adapters() if isinstance(strategy, LowRankStrategy) else ()
    return [adapter.A.detach().clone() for _, adapter in adapters]


def _bases(strategy: Any) -> list[Tensor]:
    memory = memory_of(strategy)
    return [] if memory is None else [memory.basis(one).clone() for one in range(len(memory.projections))]


@pytest.fixture
def backbone(tiny_backbone: Callable[..., Backbone]) -> Callable[..., Backbone]:
    """Makes a backbone of two blocks, 32 wide, for images of 16 pixels."""
    return partial(tiny_backbone, normalisation="half", img_size=16)


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


@pytest.fixture
def held_energy() -> Callable[[GPM, Tensor], list[float]]:
    """Returns which share of the energy of features, given as moments (L, d, d), each basis protects."""

    def shares(memory: GPM, moments: Tensor) -> list[float]:
        found = []
        for number, moment in enumerate(moments):
            free = memory.residual(moment, memory.projections.index(number))
            found.append(1 - float(free.trace() / moment.trace()))
        return found

    return shares


Prefix = tuple[Tensor, Tensor]
ByHand = Callable[..., Tensor]


@pytest.fixture(scope="session")
def by_hand() -> ByHand:
    """Returns the tokens (N, d) of one image after a plain vision transformer, from its weights by hand.

    Takes the timm model, an image (3, H, W), prompt tokens (P, d), and prefixes by block, each keys and
    values (L, d). It computes one head after the other.
    """
    return _by_hand


@torch.no_grad()
def _by_hand(
    vit: Any, image: Tensor, tokens: Tensor | None = None, prefixes: dict[int, Prefix] | None = None
) -> Tensor:
    weight: dict[str, Tensor] = vit.state_dict()
    kernel = weight["patch_embed.proj.weight"]
    side = kernel.shape[-1]
    patches = image.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1)
    x = patches.flatten(1) @ kernel.flatten(1).T + weight["patch_embed.proj.bias"]
    x = torch.cat([weight["cls_token"][0], x]) + weight["pos_embed"][0]
    if tokens is not None:
        x = torch.cat([x[:1], tokens, x[1:]])

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
        return scaled * weight[f"{name}.weight"] + weight[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weight[f"{name}.weight"].T + weight[f"{name}.bias"]

    for index, block in enumerate(vit.blocks):
        name = f"blocks.{index}"
        q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, dim=1)
        if prefixes and index in prefixes:
            keys, values = prefixes[index]
            k, v = torch.cat([keys, k]), torch.cat([values, v])
        heads = []
        for columns in torch.arange(x.shape[1]).split(x.shape[1] // block.attn.num_heads):
            scores = q[:, columns] @ k[:, columns].T / len(columns) ** 0.5
            heads.append(scores.softmax(dim=1) @ v[:, columns])
        x = x + linear(torch.cat(heads, dim=1), f"{name}.attn.proj")
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        x = x + linear(hidden, f"{name}.mlp.fc2")
    return norm(x, "norm")
