"""Plain LoRA: low-rank adapters trained on one experience after the other, with nothing against forgetting.

The adapter pair of each adapted projection is trained together with the head of the current experience. Two
methods carry this name in the literature, and they differ in what happens between experiences: ``merge``
adds the trained product to the weight and starts a fresh pair, ``shared`` keeps training one pair through
the whole stream. The first is also called incremental LoRA, the second sequential LoRA.

Source: LoRA, https://arxiv.org/abs/2106.09685; as continual-learning baselines in InfLoRA,
https://arxiv.org/abs/2404.00228 (adapters on key and value projections of every block, no alpha).

Departures: None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from cl_bench.adapters import inject
from cl_bench.backbones import Backbone
from cl_bench.experience import Experience
from cl_bench.strategy import Strategy, TrainingData


class LoRA(Strategy):
    """Sequential training of low-rank adapters.

    Args:
        backbone: Pre-trained vision transformer.
        variant: ``merge``: a fresh adapter for every experience, merged at its end; ``shared``: one for all.
        targets: Projections that carry an adapter, among q, k, v, proj, fc1, fc2.
        rank: Rank of every adapter.
        scale: Factor of the low-rank product.
        kwargs: Settings of every strategy.
    """

    name = "LoRA"

    def __init__(
        self,
        backbone: Backbone,
        *,
        variant: Literal["merge", "shared"] = "merge",
        targets: Sequence[str] = ("k", "v"),
        rank: int = 10,
        scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        self.variant = variant
        self.layers = inject(backbone, targets, rank, scale)

    def expand(self, experience: Experience) -> None:
        """Start a fresh adapter where the variant asks for one."""
        super().expand(experience)
        if experience.is_first or self.variant == "merge":
            for layer in self.layers:
                layer.reset()

    def after_training(self, data: TrainingData) -> None:
        """Add the trained product to the weight, unless the adapter lives on."""
        if self.variant == "merge":
            for layer in self.layers:
                layer.merge()
