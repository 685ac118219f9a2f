"""KeepLoRA: learn only in the residual of what the pre-trained weight and older experiences rely on.

A memory for each adapted projection starts from the principal input directions of the pre-trained weight and
grows by those of each experience's features. Before an experience, the gradient of the whole weight is
averaged over its training images and cleared of the memory; its strongest input directions become the rows
of ``A``, frozen, and ``B`` starts so that ``B A`` is that gradient at rank r. The product is first taken out
of the weight, so the function starts unchanged, and only ``B`` and the head are trained.

Source: KeepLoRA, ICLR 2026, https://arxiv.org/abs/2601.19659, and its released code.

=================================  ==========================================================
paper                              here
=================================  ==========================================================
``W_p``, energy ``ε_w``            ``principal_subspace``, ``weight_threshold``
``M_t``, energy ``ε_f``            ``memory.update``, ``feature_threshold``
``M'_t = [W_p, M_t]``              ``memory``, a basis for each adapted projection
``G``, first-step gradient         ``full_weight_gradients``
``Ĝ = G (I - M' M'ᵀ)``, rank r     ``memory.free_directions`` of ``Gᵀ``
``A``, ``B`` from the SVD of ``Ĝ`` rows of ``A`` are its directions U, and ``B = G U``
``W - s B A``, then train ``B``    ``AdaptedLinear.subtract``
=================================  ==========================================================

Departures:

* Only a vision transformer, with the cross-entropy over the classes of the experience, where the paper
  adapts both towers of CLIP and compares images with class names. That part is reconstructed: a head must
  exist before the first gradient, so it starts from class means, scaled as KeepLoRA+ scales its classifier.
  With ``head_start: random`` the gradient is mostly that of a random head.
* ``principal: output`` and ``input_statistic: batch_average`` are what the released code does: it takes the
  principal directions from the output side of its square weights, and averages the tokens at each place of a
  batch instead of gathering their second moment. The defaults are the paper's.
* Exact decompositions in place of randomised ones, and as many directions as reach a threshold, where the
  released code takes one fewer.
* Schedules are stepped once an epoch, and the released code's OneCycleLR once a step.
* If fewer than r directions are free, the remaining rows of ``A`` are zero, with a warning. The run
  continues, because the memory starts from the weights and the paper lets it fill up. The released code takes
  singular vectors of rounding errors, which may lie in what it protects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import Promises, TrainingData
from cl_bench.data.experience import Experience
from cl_bench.maths.memory import GPM, reaching
from cl_bench.maths.subspace import principal_subspace
from cl_bench.measure.gradients import full_weight_gradients
from cl_bench.measure.moments import TokenAverages, second_moments
from cl_bench.measure.passes import measure
from cl_bench.network.backbones import Backbone


class KeepLoRA(LowRankStrategy):
    """Up-projections trained over the strongest residual directions of the first gradient.

    Args:
        backbone: Pre-trained vision transformer.
        targets: Projections that carry an adapter; their inputs have one width.
        rank: Rank of every adapter.
        scale: Factor of the low-rank product.
        weight_threshold: Share of the energy of a pre-trained weight that is protected from the start.
        feature_threshold: Share of the energy of its inputs that each experience protects.
        principal: Side of the weight that its principal directions come from: input, or output as released.
        input_statistic: What to measure of the inputs: second_moment, or batch_average as released.
        head_start: Where a new head starts: means, or random.
        kwargs: Settings of every strategy with adapters.
    """

    name = "KeepLoRA"
    promises = Promises(start_within=1e-5)  # the product is taken out of the weight, which rounds
    memory: GPM

    def __init__(
        self,
        backbone: Backbone,
        *,
        targets: Sequence[str] = ("q", "k", "v", "proj"),
        rank: int = 16,
        scale: float = 1 / 16,
        weight_threshold: float = 0.85,
        feature_threshold: float = 0.99,
        principal: Literal["input", "output"] = "input",
        input_statistic: Literal["second_moment", "batch_average"] = "second_moment",
        head_start: Literal["means", "random"] = "means",
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, targets=targets, rank=rank, scale=scale, head_start=head_start, **kwargs)
        self.weight_threshold = weight_threshold
        self.feature_threshold = feature_threshold
        self.principal = principal
        self.input_statistic = input_statistic
        for _, adapter in self.adapters():
            adapter.A.requires_grad_(False)
        shapes = {(*adapter.B.shape[:1], *adapter.A.shape[1:]) for _, adapter in self.adapters()}
        if len(shapes) != 1:
            raise ValueError(
                "KeepLoRA decomposes all adapted projections together, and these differ in size: "
                "choose targets among q, k, v and proj, or a single one."
            )
        height, width = shapes.pop()
        if principal == "output" and height != width:
            raise ValueError(
                "Output directions of a projection can replace input directions only if it is square: "
                "set principal to input, or choose targets among q, k, v and proj."
            )
        self.memory = GPM(len(self.layer_of), width, dtype=torch.float32)  # M'

    def expand(self, experience: Experience) -> None:
        """Grow the head; before the first experience, protect the principal directions of the weights."""
        super().expand(experience)
        if experience.is_first and self.weight_threshold > 0:
            for projection, weight in enumerate(self.of_projections([one.weight for one in self.layers])):
                side = weight if self.principal == "input" else weight.mT
                self.memory.replace(projection, principal_subspace(side, self.weight_threshold))  # W_p

    def before_training(self, data: TrainingData) -> None:
        """Start every adapter from the residual of the first gradient."""
        of_layers = full_weight_gradients(self._loss_of, self.layers, data.augmented())
        gradients = torch.stack(self.of_projections(of_layers))  # G
        directions = self.memory.free_directions(gradients.mT, self.rank, short="zeros")  # U of Ĝ
        for (_, adapter), gradient, chosen in zip(self.adapters(), gradients, directions, strict=True):
            adapter.A.copy_(chosen.mT)
            adapter.B.copy_(gradient @ chosen)
        for layer in self.layers:
            layer.subtract()  # W - s B A

    def after_training(self, data: TrainingData) -> None:
        """Merge, then protect what the images of this experience use of the merged model."""
        super().after_training(data)
        moments = self._input_moments(data)[self.layer_of]
        self.memory.update(moments, reaching(self.feature_threshold))  # M_t

    def _loss_of(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.features(images), labels)

    def _input_moments(self, data: TrainingData) -> Tensor:
        if self.input_statistic == "second_moment":
            return second_moments(self.features, self.layers, data.plain(), torch.float32)
        averages = TokenAverages(self.layers)
        measure(self.features, data.plain(), averages)
        return averages.second_moments()
