"""RanPAC: ridge regression on random features of a backbone that is adapted once.

Bottleneck adapters are trained in the first experience and frozen. A fixed random projection with a ReLU
then widens every feature, and the sums of these wide features over all images and over each class give the
ridge regression of all experiences at once. Its strength is chosen anew in every experience, by the error
on a fifth of the new images.

Source: RanPAC, https://arxiv.org/abs/2307.02251, algorithm 1, and https://github.com/RanPAC/RanPAC.

=============================================  ================================
paper                                          here
=============================================  ================================
parameter-efficient tuning in the first task   ``BottleneckStrategy``
W, random projections; φ(f W)                  ``RidgeHead.hidden``
G = Σ h hᵀ, C = Σ h yᵀ                         ``RidgeHead.gram``, ``sums``
(G + λ I)⁻¹ C                                  ``RidgeHead.solve``
λ in 10⁻⁸ … 10⁸ by the error on a fifth        ``best_ridge``
=============================================  ================================

Departures:

* The images that choose λ are drawn once for all strengths, and 17 solutions come from one decomposition in
  float64, where the code solves 17 systems in float32: the minimum is that of exact arithmetic.
* Adapters on every dataset: for ImageNet-R the code scales and shifts features instead (SSF).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.contracts.bottleneck import BottleneckStrategy
from cl_bench.contracts.strategy import Promises, TrainingData
from cl_bench.data.experience import Experience
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import RidgeHead, pooled

RIDGES = tuple(10.0**power for power in range(-8, 9))

_AT_ONCE = 4096  # images whose wide features are added together; the choice of λ holds those of all


class RanPAC(BottleneckStrategy):
    """A ridge head on random features.

    Args:
        backbone: Pre-trained vision transformer.
        random_features: Number M of random features; null for ridge regression on the features themselves.
        adaptation: Whether to train bottlenecks in the first experience.
        kwargs: Settings of every strategy with bottlenecks.
    """

    # The solution for old classes depends on every new image.
    promises = Promises(keeps_old_head=False, constant="features")
    small: ClassVar[Mapping[str, object]] = {**BottleneckStrategy.small, "random_features": 64}
    head: RidgeHead

    def __init__(
        self,
        backbone: Backbone,
        *,
        random_features: int | None = 10_000,
        adaptation: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        self.head = RidgeHead(backbone.feature_dim, random_features)
        self.adaptation = adaptation
        left_out = {"adaptation": adaptation, "random features": random_features is not None}
        self.variant = ", ".join(f"no {part}" for part, kept in left_out.items() if not kept) or None

    def expand(self, experience: Experience) -> None:
        """Make room for the new classes; only the first experience trains."""
        super().expand(experience)
        self.requires_grad_(False)
        if experience.is_first and self.adaptation:
            self.renew()

    def after_training(self, data: TrainingData) -> None:
        """Add the new images to the sums, choose λ, and solve."""
        parts = [
            (self.whole_batch(pooled(self.features(images))), self.whole_batch(labels))
            for images, labels in data.plain()
        ]
        features, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        for some, own in zip(features.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True):
            self.head.add(some, own)
        chosen = self.agreed(torch.randperm(len(labels))).to(labels.device)
        targets = F.one_hot(labels - self.experience.classes.start, self.experience.num_classes)
        self.head.solve(best_ridge(self.head.hidden(features[chosen]), targets[chosen]))


def best_ridge(hidden: Tensor, targets: Tensor, ridges: tuple[float, ...] = RIDGES) -> float:
    """Return the ridge whose solution on the first 80 % of the rows has the least error on the others.

    Args:
        hidden: H (N, M).
        targets: Y (N, C).
        ridges: Candidates; the first of equals wins.
    """
    fitted, count = max(1, int(0.8 * len(hidden))), min(int(0.8 * len(hidden)), len(hidden) - 1)
    h, y = hidden[:fitted].double(), targets[:fitted].double()
    held, expected = hidden[count:].double(), targets[count:].double()
    if fitted <= hidden.shape[1]:  # H Hᵀ = U e Uᵀ, and the predictions are (held Hᵀ) U (e + λ)⁻¹ Uᵀ Y
        values, vectors = torch.linalg.eigh(h @ h.T)
        left, right = held @ h.T @ vectors, vectors.T @ y
    else:  # Hᵀ H = U e Uᵀ, and the predictions are held U (e + λ)⁻¹ Uᵀ Hᵀ Y
        values, vectors = torch.linalg.eigh(h.T @ h)
        left, right = held @ vectors, vectors.T @ (h.T @ y)
    values = values.clamp(min=0)
    errors = [((left / (values + ridge)) @ right - expected).square().mean() for ridge in ridges]
    return ridges[int(torch.stack(errors).argmin())]
