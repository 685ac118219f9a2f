"""LoRA-DRS: learning inside the directions in which the inputs do not drift, towards separate classes.

Before an experience, one pass measures the inputs of each adapted block in a network from whose pre-trained
weights everything learnt so far has been *subtracted*; the directions that hold most of their energy span the
drift-resistant space. Both factors train, and what the optimizer does to them is projected into that space.
An augmented triplet loss separates the classes from each other and from old prototypes, and an image gets the
class whose mean feature is nearest by angle.

Source: LoRA-DRS, also LoRA⁻ DRS, CVPR 2025, https://arxiv.org/abs/2503.18985, read in a digest, and its code
in a fork, https://github.com/DngBack/LoRA-Sub-DRS, and in LibContinual. With ``rectification``, the gradient
rectification of JANUS-LoRA, https://arxiv.org/abs/2605.28495, as its plug-in.

==========================================  ==============================================================
paper                                       here
==========================================  ==============================================================
``W_0 - Σ_{i<t} B_i A_i``                   ``_subtracted``, from ``learnt``, the sum of all products
``S = Xᵀ X / N``, U of 0.99 of its energy   ``before_training``; ``memory`` holds the complement of ``U``
``T = U Uᵀ``, over ``‖U Uᵀ‖_F`` (code)      ``_transformed``, ``normalise``
``A ← A + ΔA T``, ``B ← B + T ΔB``          ``after_step``
``CE + λ ATL``                              ``loss``, ``maths.losses.augmented_triplet``
nearest class mean, cosine                  ``forward``, ``prototypes``
==========================================  ==============================================================

Departures:

* ``normalise`` divides the projector by its Frobenius norm, which is √k for k directions and so shortens
  every step; the released code does it. It is off by default: the paper has the projector itself.
* ``T`` of the inputs is applied to the outputs of ``B``, as published; so a projection must be square. The
  released code chooses the side by comparing sizes, which fails at a rank as large as the width.
* Old products are part of the weight, and their sum is kept beside it; the released code keeps every pair.
* ``B`` starts at zero, as in LibContinual, and the function does not change; the fork draws it sparsely.
* Prototypes are means over images as at test time; LibContinual takes augmented ones.
* With ``rectification``, both gradients are first replaced by the pair whose joint effect on the weight is
  nearest to its gradient inside the drift-resistant space; the paper does not say how the two are combined.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cl_bench.contracts.protection import ProtectedStrategy
from cl_bench.contracts.strategy import TrainingData
from cl_bench.data.experience import Experience
from cl_bench.maths.losses import augmented_triplet
from cl_bench.maths.subspace import directions_needed, of_unit_energy, spectrum
from cl_bench.measure.means import class_means
from cl_bench.measure.moments import second_moments
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import Prototypes, pooled


class LoRADRS(ProtectedStrategy):
    """Both factors trained inside what the subtracted network uses, with prototypes as the classifier.

    Args:
        backbone: Pre-trained vision transformer.
        retained: Share of the energy of its inputs, in the subtracted network, that an update may use.
        normalise: Whether the projector is divided by its Frobenius norm, as released.
        triplet_weight: Factor of the triplet loss, λ.
        margin: By how much another class should be farther than the own, in distances on the unit sphere.
        rectification: GR: whether both gradients are rectified before the optimizer sees them.
        kwargs: Settings of every strategy with protected directions.

    Attributes:
        learnt: Sum of all products merged so far, (P, d, d), for each adapted projection.
        prototypes: Mean features of the classes learnt so far.
    """

    name = "LoRA-DRS"
    learnt: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        retained: float = 0.99,
        normalise: bool = False,
        triplet_weight: float = 0.05,
        margin: float = 1.0,
        rectification: bool = False,
        **kwargs: Any,
    ) -> None:
        if not 0 < retained <= 1:
            raise ValueError(
                f"With {retained} of the energy an update has no direction left, or more than all: retain a "
                "share above 0, up to 1."
            )
        # Both thresholds of the base class are for a memory that grows; this one is replaced.
        super().__init__(
            backbone, rectification=rectification, row_space="free", threshold=0, threshold_end=0, **kwargs
        )
        self.promises = replace(self.promises, vectors_per_class=1)
        self.variant = "GR" if rectification else None
        self.retained = retained
        self.normalise = normalise
        self.triplet_weight = triplet_weight
        self.margin = margin
        self.prototypes = Prototypes(backbone.feature_dim, "cosine")
        weights = self.of_projections([layer.weight for layer in self.layers])
        width = self.memory.dim
        if any(weight.shape != (width, width) for weight in weights):
            raise ValueError(
                "LoRA-DRS projects the outputs of an up-projection by a projector of its inputs, and these "
                "differ in number: choose targets among q, k, v and proj."
            )
        self.register_buffer("learnt", torch.stack([torch.zeros_like(weight) for weight in weights]))
        self._before: list[tuple[Tensor, Tensor]] = []

    def expand(self, experience: Experience) -> None:
        """Make room for the new classes, their prototypes included."""
        super().expand(experience)
        self.prototypes.grow(experience.num_classes)

    def before_training(self, data: TrainingData) -> None:
        """Find the drift-resistant space; in the first experience, it is everything."""
        if not self.experience.is_first:
            with self._subtracted():
                moments = second_moments(self.features, self.layers, data.augmented())
            shares, directions = spectrum(of_unit_energy(moments, self.memory.energy))
            for number, count in enumerate(directions_needed(shares, self.retained).tolist()):
                self.memory.replace(self.memory.first_with(number), directions[number, :, count:])
        super().before_training(data)

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        """Return the cross-entropy over the new classes plus the weighted triplet loss."""
        old = self.prototypes.means[: self.experience.classes.start]
        # Positives and negatives may be on any process.
        batch = self.whole_batch(pooled(features)), self.whole_batch(labels)
        triplets = augmented_triplet(*batch, old, self.margin)  # ATL
        return super().loss(features, labels) + self.triplet_weight * triplets

    @torch.no_grad()
    def rectify_gradients(self) -> None:
        """Rectify both gradients if asked; note where the optimizer starts from."""
        if self.rectification:
            self.project_gradients()
            self.rectify_factors()
        self._before = [(adapter.A.clone(), adapter.B.clone()) for _, adapter in self.adapters()]

    def after_step(self) -> None:
        """Project what the optimizer did to both factors."""
        if self.experience.is_first:
            return
        for (projection, adapter), (A, B) in zip(self.adapters(), self._before, strict=True):
            adapter.A.copy_(A + self._transformed((adapter.A - A).mT, projection).mT)  # ΔA T
            adapter.B.copy_(B + self._transformed(adapter.B - B, projection))  # T ΔB

    def after_training(self, data: TrainingData) -> None:
        """Keep the mean features of the new classes, and what was learnt; merge."""
        classes = self.experience.classes
        self.prototypes.write(class_means(self.features, data.plain(), classes), classes)
        for projection, adapter in self.adapters():
            self.learnt[projection] += adapter.delta()
        super().after_training(data)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to the cosines (B, classes seen) with all prototypes."""
        cosines: Tensor = self.prototypes(pooled(self.features(images)))
        return cosines

    def _transformed(self, change: Tensor, projection: int) -> Tensor:
        """Return ``T`` times the columns of a change (d, r)."""
        inside = self.memory.residual(change, projection)
        free = self.memory.dim - self.memory.basis(projection).shape[1]  # k
        return inside / free**0.5 if self.normalise else inside

    @contextmanager
    def _subtracted(self) -> Iterator[None]:
        """Replace each weight by the pre-trained one minus all that was learnt; restore it bit by bit."""
        twice = iter(2 * self.learnt)  # the weight holds it once
        kept = [layer.weight.clone() for layer in self.layers]
        try:
            for layer in self.layers:
                for rows in layer.projections:
                    layer.weight[rows] -= next(twice)
                layer.follow()
            yield
        finally:
            for layer, weight in zip(self.layers, kept, strict=True):
                layer.weight.copy_(weight)
                layer.follow()
