"""Keeping new features away from the prototypes of old classes while a method trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from cl_bench.contracts.strategy import Strategy, TrainingData
from cl_bench.data.experience import Experience
from cl_bench.maths.losses import augmented_triplet, decoupled_margin
from cl_bench.measure.means import class_means
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import Prototypes, pooled

MarginLoss = Literal["nearest", "all", "triplet"]
"""How nearness counts: to the nearest old prototype, to all that are too near, or by triplets."""


_MARGIN: dict[MarginLoss, float] = {"nearest": 0.2, "all": 0.2, "triplet": 1.0}


class DecoupledMargin(Strategy):
    """Adds to the loss of a method a term that pushes new features away from old prototypes.

    It precedes another strategy among the bases of a class. At the end of every experience it keeps the mean
    feature of each new class, from one pass over the training images as at test time. In the first experience
    there are no old prototypes, and the term is zero.

    Args:
        backbone: Pre-trained vision transformer.
        decoupled_margin: Whether to add the term; without it nothing is measured or kept.
        margin: Cosine to an old prototype above which a feature is too near, 0.2 unless given; for triplets
            the distance by which a negative should be farther than a positive, 1 unless given.
        margin_weight: Factor of the term. Of 0, 0.1 and 1, 1 did best, by less than half a point, on a
            validation split of a small stream of natural images.
        margin_loss: How nearness counts: nearest, all or triplet.
        kwargs: Settings of the other strategy.

    Attributes:
        prototypes: Mean features of the classes learnt so far.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        decoupled_margin: bool = False,
        margin: float | None = None,
        margin_weight: float = 1.0,
        margin_loss: MarginLoss = "nearest",
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        if decoupled_margin:  # a prototype for each class, and a cosine to each old one for every feature
            grown = (*self.promises.step_grows_with, "classes")
            self.promises = replace(self.promises, vectors_per_class=1, step_grows_with=grown)
        self.decoupled_margin = decoupled_margin
        self.margin = _MARGIN[margin_loss] if margin is None else margin
        self.margin_weight = margin_weight
        self.margin_loss = margin_loss
        self.prototypes = Prototypes(backbone.feature_dim)

    def expand(self, experience: Experience) -> None:
        """Make room for the new classes, their prototypes included."""
        super().expand(experience)
        if self.decoupled_margin:
            self.prototypes.grow(experience.num_classes)

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        """Return the loss of the other strategy plus the margin term."""
        return super().loss(features, labels) + self.margin_term(pooled(features), labels)

    def margin_term(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted margin term, a scalar, of features (B, d) and labels (B,)."""
        if not self.decoupled_margin or self.experience.is_first:
            return features.new_zeros(())
        old = self.prototypes.means[: self.experience.classes.start]
        if self.margin_loss == "triplet":  # positives and negatives may be on any process
            batch = self.whole_batch(features), self.whole_batch(labels)
            return self.margin_weight * augmented_triplet(*batch, old, self.margin)
        return self.margin_weight * decoupled_margin(features, old, self.margin, self.margin_loss)

    def after_training(self, data: TrainingData) -> None:
        """Finish the other strategy, then keep the mean features of the new classes."""
        super().after_training(data)
        if self.decoupled_margin:
            classes = self.experience.classes
            self.prototypes.write(class_means(self.features, data.plain(), classes), classes)
