"""SLCA++: adapters that learn slowly throughout the stream, and classifiers that are aligned after it.

One set of low-rank adapters is trained in all experiences, at a small share of the learning rate, so that
features move little. After every experience but the first, the heads of all experiences are trained
together on features drawn from a Gaussian of each class seen, and these heads classify. Before the next
experience the heads are as they were.

Source: SLCA, https://arxiv.org/abs/2303.05118; SLCA++, https://arxiv.org/abs/2408.08295; and
https://github.com/GengDavid/SLCA, ``models/slca_pp.py``.

================================================  ======================================
paper                                             here
================================================  ======================================
slow learner                                      ``first_share``, ``later_share``
Hybrid-SL: low-rank update of W                   ``LowRankStrategy``, A from W's SVD
symmetric cross-entropy                           ``symmetric_cross_entropy``
classifier alignment (CA)                         ``ClassifierAlignment``
================================================  ======================================

Departures:

* Only the low-rank adapters of Hybrid-SL are trained: the suite freezes the backbone, so norms, biases and
  class token (122,880 of 638,976 parameters) stay. SLCA, which trains the whole backbone, is left out.
* Heads start as PyTorch draws them; the code draws a truncated normal of deviation 0.02 and zero biases.
* The experience of a class is known; the code divides its label by the size of the newest experience.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.contracts.alignment import ClassifierAlignment
from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import TrainingData
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import TrainableHead, pooled


class SlowAdapters(LowRankStrategy):
    """Low-rank adapters that are trained in all experiences, more slowly than the head, and never merged.

    Args:
        backbone: Pre-trained vision transformer.
        first_share: Share of the optimizer's learning rate that the adapters have in the first experience.
        later_share: The share that they have in all others.
        cross_entropy: Weight a of the cross-entropy.
        reverse: Weight b of the reverse cross-entropy.
        targets: Projections that carry an adapter.
        rank: Rank of every adapter.
        scale: Factor of the low-rank product.
        kwargs: Settings of every strategy with adapters.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        first_share: float = 0.5,
        later_share: float = 0.1,
        cross_entropy: float = 1.0,
        reverse: float = 0.1,
        targets: Sequence[str] = ("qkv", "fc1", "fc2"),
        rank: int = 4,
        scale: float = 0.8,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, targets=targets, rank=rank, scale=scale, **kwargs)
        self.first_share = first_share
        self.later_share = later_share
        self.cross_entropy = cross_entropy
        self.reverse = reverse

    @torch.no_grad()
    def renew(self) -> None:
        """Start A from the strongest right singular vectors of W; later experiences train on."""
        if self.experience.is_first:
            for layer in self.layers:
                for name, rows in layer.rows.items():
                    _, _, right = torch.linalg.svd(layer.weight[rows], full_matrices=False)
                    layer.adapter(name).A.copy_(right[: self.rank])
                    layer.adapter(name).B.zero_()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give the adapters their share of the learning rate."""
        slow, *rest = super().parameter_groups()
        share = self.first_share if self.experience.is_first else self.later_share
        return [slow | {"lr": share * self.base_lr}, *rest]

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        """Return a CE + b RCE over the classes of this experience."""
        assert isinstance(self.head, TrainableHead)
        logits = self.head.current(pooled(features))
        own = labels - self.experience.classes.start
        return symmetric_cross_entropy(logits, own, self.cross_entropy, self.reverse)

    def after_training(self, data: TrainingData) -> None:
        """Keep the adapters as they are."""


class SLCA(ClassifierAlignment, SlowAdapters):
    """Slow adapters with aligned classifiers.

    Args:
        backbone: Pre-trained vision transformer.
        alignment: Whether to align the classifiers.
        alignment_decay: Largest share of a mean that is taken away before features are drawn.
        drift: Relative shift of features in an experience that alignment allows for.
        kwargs: Settings of the alignment, and of the adapters.
    """

    name = "SLCA++"

    def __init__(
        self,
        backbone: Backbone,
        *,
        alignment: bool = True,
        alignment_decay: float = 0.0,
        drift: float = 0.02,
        **kwargs: Any,
    ) -> None:
        kwargs |= {"alignment": alignment, "alignment_decay": alignment_decay, "drift": drift}
        super().__init__(backbone, **kwargs)
        self.variant = None if alignment else "without alignment"


def symmetric_cross_entropy(logits: Tensor, labels: Tensor, forward: float, reverse: float) -> Tensor:
    """Return a weighted sum of the cross-entropy and its reverse, -Σ p log q with q the one-hot label.

    Source: https://arxiv.org/abs/1908.06112, equation 7, with log 0 taken as log 1e-4.

    Args:
        logits: One column for each class (B, C).
        labels: Columns (B,).
        forward: Weight a.
        reverse: Weight b.

    >>> symmetric_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), 0.0, 1.0)
    tensor(4.6052)
    """
    certain = F.one_hot(labels, logits.shape[1]).to(logits.dtype).clamp(min=1e-4)
    backward = -(logits.softmax(dim=1) * certain.log()).sum(dim=1).mean()
    return forward * F.cross_entropy(logits, labels) + reverse * backward
