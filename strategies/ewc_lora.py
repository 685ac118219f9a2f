"""EWC-LoRA: elastic weight consolidation of the weights themselves, for products of adapters.

Every experience trains a fresh pair of factors, which is merged at its end. One pass then measures how much
the loss depends on each entry of the adapted weights, the diagonal of an empirical Fisher matrix, and adds it
to that of older experiences. In later experiences the loss grows with the square of what the product adds to
an entry, times its importance; memory stays the same however long the stream is.

Source: EWC-LoRA, ICLR 2026, as in its released code, https://github.com/yaoyz96/low-rank-cl; EWC,
https://arxiv.org/abs/1612.00796.

============================================  ======================================================
paper                                         here
============================================  ======================================================
``L = CE + λ/2 Σ Ω ⊙ (B A)²``                 ``loss``, ``_penalty``
``F``: squared gradients for ``ΔW``           ``squared_weight_gradients``, of the mean over a batch
``Ω ← γ Ω + F``                               ``after_training``
============================================  ======================================================

Departures:

* As in the released code, gradients are squared after the mean over a batch, not for each image: the batch
  size scales ``F``, and the strength goes with it. The pass draws images as in training.
* The penalty is left out of the gradients of ``F``, as at a minimum of the cross-entropy.
* The text at hand prints four means without naming their datasets, so the logs of the code are quoted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import TrainingData
from cl_bench.measure.gradients import squared_weight_gradients
from cl_bench.network.backbones import Backbone


class EWCLoRA(LowRankStrategy):
    """Adapters whose products are held back where older experiences need the weight.

    Args:
        backbone: Pre-trained vision transformer.
        strength: Factor of the penalty, λ.
        decay: What of the older importance stays after an experience, γ, in [0, 1].
        kwargs: Settings of every strategy with adapters.
    """

    name = "EWC-LoRA"

    def __init__(
        self, backbone: Backbone, *, strength: float = 1e7, decay: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(backbone, **kwargs)
        self.strength = strength
        self.decay = decay
        for number, weight in enumerate(self.of_projections([layer.weight for layer in self.layers])):
            self.register_buffer(f"importance_{number}", torch.zeros_like(weight))  # Ω

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        """Return the cross-entropy over the new classes plus the penalty."""
        entropy = super().loss(features, labels)
        return entropy if self.experience.is_first else entropy + self._penalty()

    def after_training(self, data: TrainingData) -> None:
        """Measure what this experience needs of the weights, and merge."""
        of_layers = squared_weight_gradients(self._entropy_of, self.layers, data.augmented())
        for number, found in enumerate(self.of_projections(of_layers)):
            self.get_buffer(f"importance_{number}").mul_(self.decay).add_(found)  # Ω ← γ Ω + F
        super().after_training(data)

    def _entropy_of(self, images: Tensor, labels: Tensor) -> Tensor:
        return super().loss(self.features(images), labels)

    def _penalty(self) -> Tensor:
        """Return half the weighted sum of squares of all products, a scalar."""
        terms = [
            (self.get_buffer(f"importance_{projection}") * adapter.delta().square()).sum()
            for projection, adapter in self.adapters()
        ]
        return self.strength / 2 * torch.stack(terms).sum()
