"""LoRA with a gradient projection memory: adapters that learn in directions which older inputs do not use.

After every experience one pass over its training images finds the input directions that hold most of their
energy, layer by layer, and adds them to a memory. In later experiences the gradient of each down-projection
loses what lies in these directions; the up-projection trains freely.

Source: GPM, https://arxiv.org/abs/2103.09762, for the memory. Applied to LoRA it is a baseline of JANUS-LoRA,
https://arxiv.org/abs/2605.28495, which also adds its gradient rectification to it as a plug-in.

========================================  ==============================================================
GPM                                       here
========================================  ==============================================================
R, inputs of a layer; Eq. 5               ``second_moments``: XᵀX / N has the same directions and energies
Eq. 8 and 9, new bases up to ``ε_th``     ``protect``, ``GPM.update``
Eq. 6, ∇W - (∇W) M Mᵀ                     ``project_gradients``, for the gradient of every ``A``
========================================  ==============================================================

Departures:

* Nothing about the baseline is public beyond its name: this is a reconstruction, JANUS-LoRA with its online
  estimation replaced by a pass, without the other two parts, and with a free row space. Adapters, schedule of
  the energy threshold and training follow InfLoRA, https://arxiv.org/abs/2404.00228.
* The memory is made of the second moment of all tokens instead of some sampled inputs: the same directions
  and energies, without the chance of a sample.
* ``rectification`` and ``row_space: safe`` are options; both off is the baseline.
"""

from __future__ import annotations

from typing import Any

import torch

from cl_bench.contracts.margin import DecoupledMargin
from cl_bench.contracts.protection import ProtectedStrategy
from cl_bench.contracts.strategy import TrainingData
from cl_bench.measure.moments import second_moments
from cl_bench.network.backbones import Backbone


class LoRAGPM(DecoupledMargin, ProtectedStrategy):
    """LoRA whose down-projections learn outside of what a pass after each experience has measured.

    Args:
        backbone: Pre-trained vision transformer.
        kwargs: Settings of every strategy with protected directions, and of the decoupled margin.
    """

    name = "LoRA-GPM"

    def __init__(self, backbone: Backbone, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        parts = {"GR": self.rectification, "DML": self.decoupled_margin}
        self.variant = " + ".join(name for name, on in parts.items() if on) or None

    def rectify_gradients(self) -> None:
        """Project the gradient of every A; as a plug-in, rectify both factors."""
        self.project_gradients()  # GPM, Eq. 6
        if self.rectification:
            self.rectify_factors()

    def after_training(self, data: TrainingData) -> None:
        """Protect what the images of this experience use, then merge."""
        self.protect(second_moments(self.features, self.layers, data.plain(), torch.float32))
        super().after_training(data)
