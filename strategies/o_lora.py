"""O-LoRA, carried over to images: new adapters are pushed to read other input directions than old ones.

Every experience trains a fresh pair of factors, which is merged at its end; its down-projection is kept. A
term of the loss is the overlap of the new down-projection with all kept ones, so that the rows of different
experiences tend to be orthogonal. That is a wish, not a guarantee: the up-projections are free, and a shorter
down-projection lowers the term as a turned one does.

Source: O-LoRA, Findings of EMNLP 2023, https://arxiv.org/abs/2310.14152, and its released code,
https://github.com/cmnfriend/O-LoRA, both for language models. Papers on images print rows of O-LoRA from
ports of their own, none of which is public; a third party has published a port to PILOT.

========================================  ==================================================
paper                                     here
========================================  ==================================================
``W_0 + Σ_i B_i A_i``                     ``LowRankStrategy``: old products are merged
``L_orth = Σ_i Σ_jk O_{i,t}[j, k]²``      ``_overlap``, ``squares``; ``absolute`` is the code's
``O_{i,t} = A_i A_tᵀ``                    ``_overlap``
``λ_1``                                   ``strength``
========================================  ==================================================

Departures:

* Carried over to images, so targets, rank, scale 1 and optimizer are those of InfLoRA,
  https://arxiv.org/abs/2404.00228, and the strength is chosen by us. At the start of an experience the
  squares add about 0.35 for each old experience, on the 24 projections of ViT-B/16 at rank 10.
* ``overlap: squares`` is the paper's term. The released code sums absolute values, 67 times as much at the
  start: a strength tuned for one does not suit the other. The code also changes its strength from experience
  to experience; here it is one number.
* The code's second term, on the norms of the factors, is left out: its scripts give it the weight 0.
* Old products are part of the weight, and only their down-projections are kept; the code keeps both factors.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import Promises, TrainingData
from cl_bench.network.backbones import Backbone


class OLoRA(LowRankStrategy):
    """Adapters whose down-projections are pushed to be orthogonal to all earlier ones.

    Args:
        backbone: Pre-trained vision transformer.
        strength: Factor of the overlap in the loss.
        overlap: How products of rows count: ``squares`` as in the paper, ``absolute`` as released.
        kwargs: Settings of every strategy with adapters.
    """

    name = "O-LoRA"
    variant = "carried over to images"
    promises = Promises(state_grows_with=("experiences",), step_grows_with=("experiences",))

    def __init__(
        self,
        backbone: Backbone,
        *,
        strength: float = 1.0,
        overlap: Literal["squares", "absolute"] = "squares",
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        self.strength = strength
        self.overlap = overlap
        for number, (_, adapter) in enumerate(self.adapters()):
            self.register_buffer(f"old_{number}", adapter.A.new_zeros(0, adapter.A.shape[1]))

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        """Return the cross-entropy over the new classes plus the weighted overlap."""
        entropy = super().loss(features, labels)
        return entropy if self.experience.is_first else entropy + self.strength * self._overlap()

    def after_training(self, data: TrainingData) -> None:
        """Keep the rows of every A, and merge."""
        for number, (_, adapter) in enumerate(self.adapters()):
            self._buffers[f"old_{number}"] = torch.cat([self.get_buffer(f"old_{number}"), adapter.A])
        super().after_training(data)

    def _overlap(self) -> Tensor:
        """Return the sum over all projections of what the products of old and new rows (r t, r) count."""
        # bfloat16 could not tell rows that are nearly orthogonal from rows that are.
        with torch.autocast(self.device.type, enabled=False):
            products = [
                self.get_buffer(f"old_{number}") @ adapter.A.mT  # O_{i,t} of all i
                for number, (_, adapter) in enumerate(self.adapters())
            ]
        each = [
            found.square().sum() if self.overlap == "squares" else found.abs().sum() for found in products
        ]
        return torch.stack(each).sum()
