"""InfLoRA: down-projections fixed in directions that older inputs do not use and the new ones use most.

Before an experience, one pass measures the second moment of the inputs of each adapted block; its strongest
directions outside the memory become the rows of ``A``, shared by keys and values and frozen. Only ``B`` and
the head are trained, so the update of the weight cannot act on what the memory protects. After the experience
a second pass extends the memory (DualGPM) until it holds a share of the energy that rises through the stream.

Source: InfLoRA, CVPR 2024, https://arxiv.org/abs/2404.00228, and its released code. The paper writes ``A``
for the matrix that is trained and ``B`` for the one that is fixed; here, as in LoRA, it is the reverse.

=================================  ==========================================================
paper                              here
=================================  ==========================================================
``W + A_t B_t``, merged            ``W + B A``, ``AdaptedLinear.merge``
``H_t``, inputs of a layer         ``second_moments``: S = XᵀX / N has their directions
``B_t``: top r of (I - M Mᵀ) H_t   ``memory.free_directions``, rows of ``A`` times 1/√3 (code)
DualGPM, ``M_t`` or its complement ``DualGPM``, ``memory.update``
``ε`` of experience t              ``energy_threshold``: linear from ``threshold`` (code)
=================================  ==========================================================

Departures:

* Old adapters are part of the weight; the released code adds up all of them in every forward pass.
* A memory that takes more than half of the dimensions in the first experience stores their complement. The
  released code would store them and treat them as free; at its thresholds this never happens.
* The clustering of features after each experience, which the released code does not use at test, is left out.
* If fewer than r directions are free, the run stops: a fixed adapter of lower rank would look like any other
  in the results. The released code continues with singular vectors of rounding errors, which may lie in what
  it protects. KeepLoRA and JANUS-LoRA, whose memories fill up by design, warn and learn in what is left.
* ``energy: features`` is the paper's rule; the default ``covariance`` is that of the code, which produced the
  published numbers, and which also takes one direction fewer in the first experience.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import TrainingData
from cl_bench.maths.memory import GPM, DualGPM, below_first, reaching
from cl_bench.maths.subspace import Energy, energy_threshold
from cl_bench.measure.moments import second_moments
from cl_bench.network.backbones import Backbone


class InfLoRA(LowRankStrategy):
    """Up-projections trained over fixed directions outside the memory.

    Args:
        backbone: Pre-trained vision transformer.
        threshold: Share of the energy of its inputs that the first experience protects.
        threshold_end: What the share rises to, linearly, by the end of the stream.
        energy: Whether shares are those of the covariance, as in the code, or of features, as in the paper.
        memory_form: ``dual`` stores the smaller of basis and complement; ``plain`` always the basis.
        kwargs: Settings of every strategy with adapters.
    """

    name = "InfLoRA"
    memory: GPM

    def __init__(
        self,
        backbone: Backbone,
        *,
        threshold: float = 0.95,
        threshold_end: float = 1.0,
        energy: Energy = "covariance",
        memory_form: Literal["dual", "plain"] = "dual",
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        self.threshold = threshold
        self.threshold_end = threshold_end
        width = self.input_width
        form = DualGPM if memory_form == "dual" else GPM
        self.memory = form(self.layer_of, width, energy, dtype=torch.float32)
        for _, adapter in self.adapters():
            adapter.A.requires_grad_(False)

    def before_training(self, data: TrainingData) -> None:
        """Choose the rows of every A; dividing by √3 gives them the size of a fresh linear layer."""
        directions = self.memory.free_directions(self._moments(data), self.rank)  # top r of (I - M Mᵀ) S
        for projection, adapter in self.adapters():
            adapter.A.copy_(directions[projection].mT / math.sqrt(3))

    def after_training(self, data: TrainingData) -> None:
        """Protect what this experience uses, and merge."""
        at, of = self.experience.index, self.experience.num_experiences
        share = energy_threshold(at, of, self.threshold, self.threshold_end)  # ε_t
        count = below_first(share) if self.memory.energy == "covariance" else reaching(share)
        self.memory.update(self._moments(data), count)
        super().after_training(data)

    def _moments(self, data: TrainingData) -> Tensor:
        return second_moments(self.features, self.layers, data.augmented(), torch.float32)
