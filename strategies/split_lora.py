"""SplitLoRA: down-projections drawn at random in the directions that all inputs so far use least.

One second moment of the inputs of each adapted block is kept over the whole stream. After every experience
its spectrum is split anew: the strongest directions are protected, the weakest are free, and the border
weighs what the free ones still hold, times the number of experiences learnt, against their number. The next
down-projection is random among the free directions and fixed, so the update of the weight cannot act on the
others; only the up-projection and the head are trained.

Source: SplitLoRA, ICLR 2026, https://github.com/iLearn-Lab/ICLR26-SplitLoRA: its released code; the paper was
read in a digest.

===========================================================  ================================================
paper                                                        here
===========================================================  ================================================
``σ``, ``U`` of the running statistic ``S``                  ``moments``, decomposed by ``GPM.update``
``k* = argmin_k (t-1) ε(k) - α k / d``, k free directions    ``split``, with t - 1 experiences learnt
``A_t = (Û R)ᵀ``, R normal                                   ``before_training``
``A_t`` scaled to ``‖A_kaiming‖_F / t`` (code)               ``before_training``
``W_0 + Σ_{i<t} B_i A_i`` frozen                             ``AdaptedLinear.merge``
cross-entropy of logits / 30 (code)                          ``loss``, ``temperature``
===========================================================  ================================================

Departures:

* ``S`` is the second moment of the inputs, as in the released code; the paper takes gradients of old
  experiences. It is the mean over all tokens, so long experiences weigh more, also as in the code, which
  keeps two equal copies of it for keys and values.
* The code protects two directions where its rule asks for one, by ``max(r*, 1) + 1`` columns; here it is
  one. Elsewhere the two agree.
* At least as many directions stay free as the rank, so that no row of ``A`` is superfluous; with a small α
  and many experiences the rule would leave none.
* A pass sees every training image once; each epoch of the released code goes over the images ten times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import TrainingData
from cl_bench.maths.losses import local_cross_entropy
from cl_bench.maths.memory import GPM
from cl_bench.maths.subspace import complement
from cl_bench.measure.moments import SecondMoments
from cl_bench.measure.passes import measure, tokens_recorded
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import GrowingLinear, pooled


class SplitLoRA(LowRankStrategy):
    """Up-projections trained over random directions of a minor subspace.

    Args:
        backbone: Pre-trained vision transformer.
        alpha: Weight of free directions against the energy that they hold, α.
        temperature: What logits are divided by in training.
        kwargs: Settings of every strategy with adapters.

    Attributes:
        moments: Mean second moment of the inputs of each layer, over all tokens of the stream, (L, d, d).
        tokens: Their number.
    """

    name = "SplitLoRA"
    memory: GPM
    head: GrowingLinear
    moments: Tensor
    tokens: Tensor

    def __init__(
        self, backbone: Backbone, *, alpha: float = 20.0, temperature: float = 30.0, **kwargs: Any
    ) -> None:
        super().__init__(backbone, **kwargs)
        width = self.input_width
        if self.rank >= width:
            raise ValueError(
                f"Rank {self.rank} leaves nothing to protect in width {width}: choose a lower rank."
            )
        self.alpha = alpha
        self.temperature = temperature
        self.memory = GPM(self.layer_of, width, dtype=torch.float32)
        self.register_buffer("moments", torch.zeros(len(self.layers), width, width))
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64))
        for _, adapter in self.adapters():
            adapter.A.requires_grad_(False)

    def before_training(self, data: TrainingData) -> None:
        """Draw the rows of every A among the free directions; in the first experience, all are free."""
        if self.experience.is_first:
            return
        for projection, adapter in self.adapters():
            free = complement(self.memory.basis(projection))  # Û
            rows = (free @ torch.randn(free.shape[1], self.rank).to(free)).mT  # (Û R)ᵀ
            # The fresh adapter has the length of a linear layer's start.
            length = adapter.A.norm() / (self.experience.index + 1)
            adapter.A.copy_(rows * (length / rows.norm()))

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        """Return the cross-entropy over the new classes, of logits divided by the temperature."""
        logits = self.head.current(pooled(features)) / self.temperature
        return local_cross_entropy(logits, labels, self.experience.classes.start)

    def after_training(self, data: TrainingData) -> None:
        """Add the inputs of this experience to the moments, split them anew, and merge."""
        inputs = SecondMoments(self.layers)
        measure(self.features, data.augmented(), inputs)
        new = tokens_recorded(inputs.tokens)[0]
        self.tokens += new
        self.moments += ((inputs.mean() - self.moments) * (new / self.tokens)).to(self.moments)
        self.memory.clear()
        self.memory.update(self.moments, self.split)
        super().after_training(data)

    def split(self, shares: Tensor, held: Sequence[int]) -> list[int]:
        """Return how many of the strongest directions each basis protects, (L).

        Args:
            shares: Share of the energy that each direction holds, (L, d), strongest first.
            held: Not used: each split starts from an empty basis.
        """
        width, learnt = shares.shape[1], self.experience.index + 1
        taken = torch.arange(1, width - self.rank + 1).to(shares)
        missing = 1 - shares.cumsum(dim=1)[:, : len(taken)]  # ε
        cost = learnt * missing - self.alpha * (width - taken) / width
        return [int(best) + 1 for best in cost.argmin(dim=1)]
