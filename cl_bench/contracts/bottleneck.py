"""Strategies with the bottleneck adapters of AdaptFormer: what EASE and RanPAC have in common.

Source: AdaptFormer, https://arxiv.org/abs/2205.13535, in the form that the released code of EASE,
https://github.com/sun-hailong/CVPR24-Ease, gives it (``backbone/vit_ease.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from cl_bench.contracts.strategy import Strategy
from cl_bench.maths.losses import local_cross_entropy
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import GrowingCosine, pooled


class Bottleneck(nn.Module):
    """An adapter ``s (W_up drop(relu(W_down x + b_down)) + b_up)``, which adds nothing when it is fresh.

    Args:
        dim: Size of a token, ``d``.
        width: Size in between.
        scale: Factor ``s`` of the output.
        dropout: Share of the inner units that training drops.

    >>> import torch
    >>> Bottleneck(dim=6, width=2)(torch.ones(1, 6)).abs().sum()
    tensor(0., grad_fn=<SumBackward0>)
    """

    def __init__(self, dim: int, width: int, scale: float = 0.1, dropout: float = 0.1) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.down = nn.Linear(dim, width)
        self.up = nn.Linear(width, dim)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, d) to what is added to them, of the same shape."""
        inner = F.dropout(self.down(x).relu(), self.dropout, self.training)
        found: Tensor = self.scale * self.up(inner)
        return found


class BottleneckBlock(nn.Module):
    """A block of a vision transformer with bottlenecks in parallel to its MLP, at most one of them in use.

    The input of a bottleneck is that of the second norm: ``x ← x + MLP(norm(x)) + a(x)``. The block takes
    over the layers of ``block`` under their names, so checkpoints of the backbone keep their keys.

    Args:
        block: A plain block of timm.

    Attributes:
        bottlenecks: The adapters, oldest first.
        used: Index of the adapter in use, None for none.

    Raises:
        ValueError: If the block computes something else.
    """

    norm1: nn.Module
    attn: nn.Module
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        if type(block) is not Block:
            raise ValueError(
                f"Bottlenecks need the blocks of a plain vision transformer, and this backbone has "
                f"{type(block).__name__}: choose another model."
            )
        for name, layer in block.named_children():
            self.add_module(name, layer)
        self.bottlenecks = nn.ModuleList()
        self.used: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, d) to tokens (B, N, d)."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        y: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return y if self.used is None else y + self.bottlenecks[self.used](x)


class BottleneckStrategy(Strategy):
    """Trains a bottleneck in every block, with a cosine classifier that is not used at test time.

    A method calls :meth:`renew` in ``expand`` whenever it wants a fresh bottleneck, and makes its own head.

    Args:
        backbone: Pre-trained vision transformer.
        bottleneck: Inner size of a bottleneck.
        bottleneck_scale: Factor of its output.
        bottleneck_dropout: Share of the inner units that training drops.
        kwargs: Settings of every strategy.

    Attributes:
        adapted: The blocks, in the order of the forward pass.
        classifier: What the bottleneck is trained with.
    """

    small: ClassVar[Mapping[str, object]] = {"bottleneck": 4}
    classifier: GrowingCosine

    def __init__(
        self,
        backbone: Backbone,
        *,
        bottleneck: int = 64,
        bottleneck_scale: float = 0.1,
        bottleneck_dropout: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        self.bottleneck = bottleneck
        self.bottleneck_scale = bottleneck_scale
        self.bottleneck_dropout = bottleneck_dropout
        self.adapted = [BottleneckBlock(block) for block in backbone.blocks]
        for index, block in enumerate(self.adapted):
            backbone.vit.set_submodule(f"blocks.{index}", block)

    def renew(self) -> None:
        """Freeze what is there, and add a fresh bottleneck to every block and a fresh classifier."""
        settings = self.bottleneck, self.bottleneck_scale, self.bottleneck_dropout
        for block in self.adapted:
            block.bottlenecks.requires_grad_(False)
            block.bottlenecks.append(Bottleneck(self.backbone.feature_dim, *settings))
            block.used = len(block.bottlenecks) - 1
        self.classifier = GrowingCosine(self.backbone.feature_dim)
        self.classifier.grow(self.experience.num_classes)
        self.sigma = nn.Parameter(self.backbone.mean.new_ones(1))

    @contextmanager
    def using(self, index: int) -> Iterator[None]:
        """Use the bottlenecks of experience ``index`` while the context is open."""
        before = [block.used for block in self.adapted]
        for block in self.adapted:
            block.used = index
        try:
            yield
        finally:
            for block, used in zip(self.adapted, before, strict=True):
                block.used = used

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        """Return the cross-entropy of cosines times a learnt factor over the classes of this experience."""
        logits = self.sigma * self.classifier.current(pooled(features))
        return local_cross_entropy(logits, labels, self.experience.classes.start)
