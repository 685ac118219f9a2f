"""A tiny adapted backbone in float64, and batches of images for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cl_bench.network.adapters import AdaptedLinear, inject
from cl_bench.network.backbones import Backbone

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture
def adapted(tiny_backbone: Callable[..., Backbone]) -> Callable[..., tuple[Backbone, list[AdaptedLinear]]]:
    """Makes a backbone and its adapted layers, whose up-projections are not zero."""

    def make(targets: tuple[str, ...] = ("q", "k", "v")) -> tuple[Backbone, list[AdaptedLinear]]:
        torch.manual_seed(0)
        backbone = tiny_backbone().double()
        layers = inject(backbone, targets, rank=2, scale=0.5)
        for layer in layers:
            for target in layer.rows:
                nn.init.normal_(layer.adapter(target).B, std=0.3)
        return backbone, layers

    return make


@pytest.fixture
def batches() -> Callable[..., Batches]:
    """Splits twelve random images of three classes into batches of a given size."""

    def split(size: int, dtype: torch.dtype = torch.float64) -> Batches:
        drawn = torch.rand(12, 3, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(12) % 3
        return list(zip(drawn.split(size), labels.split(size), strict=True))

    return split


@pytest.fixture
def loss_of() -> Callable[[Backbone], Callable[[Tensor, Tensor], Tensor]]:
    """Makes a loss of images and labels: the cross-entropy of the first three features."""
    return lambda backbone: (
        lambda images, labels: nn.functional.cross_entropy(backbone(images)[:, :3], labels)
    )
