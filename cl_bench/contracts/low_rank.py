"""A strategy with low-rank adapters: what the methods of the LoRA family have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cl_bench.contracts.strategy import Strategy, TrainingData
from cl_bench.data.experience import Experience
from cl_bench.network.adapters import LowRank, inject
from cl_bench.network.backbones import Backbone


class LowRankStrategy(Strategy):
    """A fresh adapter in every adapted projection for each experience, merged into the weight at its end.

    What it costs does not grow with the number of experiences: older adapters are part of the weight.

    Args:
        backbone: Pre-trained vision transformer.
        targets: Projections that carry an adapter, among q, k, v, qkv, proj, fc1, fc2; or the projection of
            each adapter by its name.
        rank: Rank of every adapter.
        scale: Factor of the low-rank product.
        blocks: Blocks that carry adapters, from 0; all of them if null.
        kwargs: Settings of every strategy.

    Attributes:
        layers: The adapted layers, in the order of the forward pass.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        targets: Sequence[str] | Mapping[str, str] = ("k", "v"),
        rank: int = 10,
        scale: float = 1.0,
        blocks: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        self.rank = rank
        self.layers = inject(backbone, targets, rank, scale, blocks)

    def expand(self, experience: Experience) -> None:
        """Grow the head, and start a fresh adapter in every projection."""
        super().expand(experience)
        self.renew()

    def renew(self) -> None:
        """Start fresh adapters, in place."""
        for layer in self.layers:
            layer.reset()

    def after_training(self, data: TrainingData) -> None:
        """Add the trained products to the weights."""
        for layer in self.layers:
            layer.merge()

    def adapters(self) -> Iterator[tuple[int, LowRank]]:
        """Yield every adapter after the index of its layer in :attr:`layers`."""
        for index, layer in enumerate(self.layers):
            for name in layer.rows:
                yield index, layer.adapter(name)
