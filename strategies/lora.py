"""Plain LoRA: low-rank adapters trained on one experience after the other, with nothing against forgetting.

The adapter pair of each adapted projection is trained together with the head of the current experience. The
literature uses the name for two methods, which differ between experiences: ``merge`` adds the trained product
to the weight and starts a fresh pair, ``shared`` keeps training one pair through the whole stream. The first
is also called incremental LoRA, the second sequential LoRA.

Source: LoRA, https://arxiv.org/abs/2106.09685; as continual-learning baselines in InfLoRA,
https://arxiv.org/abs/2404.00228 (adapters on key and value projections of every block, no alpha).

====================  =============================================
paper                 here
====================  =============================================
``W_0 + ΔW``          ``AdaptedLinear``: ``W + s B A``
``A`` drawn, ``B``=0  ``LowRank.reset``, which ``renew`` calls
merge for inference   ``AdaptedLinear.merge``, in after_training
====================  =============================================

Departures: None.
"""

from __future__ import annotations

from typing import Any, Literal

from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import TrainingData
from cl_bench.network.backbones import Backbone


class LoRA(LowRankStrategy):
    """Sequential training of low-rank adapters.

    Args:
        backbone: Pre-trained vision transformer.
        variant: ``merge``: a fresh adapter for every experience, merged at its end; ``shared``: one for all.
        kwargs: Settings of every strategy with adapters.
    """

    name = "LoRA"

    def __init__(
        self, backbone: Backbone, *, variant: Literal["merge", "shared"] = "merge", **kwargs: Any
    ) -> None:
        super().__init__(backbone, **kwargs)
        self.variant = variant

    def renew(self) -> None:
        """Start a fresh adapter, unless the variant shares one."""
        if self.experience.is_first or self.variant == "merge":
            super().renew()

    def after_training(self, data: TrainingData) -> None:
        """Add the trained product to the weight, unless the adapter lives on."""
        if self.variant == "merge":
            super().after_training(data)
