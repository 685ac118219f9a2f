"""Nearest class mean: no training, each class is its mean feature.

One pass over the training images of an experience, transformed as at test time, gives the mean feature of
each new class; an image gets the class whose mean is nearest. The result does not depend on the class order,
which makes it the floor that every trained strategy is held against.

Source: iCaRL's classifier without exemplars, https://arxiv.org/abs/1611.07725; with ``similarity: cosine``
it is SimpleCIL, https://arxiv.org/abs/2303.07338.

Departures: None.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from cl_bench.contracts.strategy import Strategy, TrainingData
from cl_bench.measure.means import class_means
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import Prototypes


class NearestClassMean(Strategy):
    """Class means of frozen features.

    Args:
        backbone: Pre-trained vision transformer.
        similarity: ``euclidean``: nearest mean; ``cosine``: mean of the most similar direction.
        kwargs: Settings of every strategy.
    """

    name = "NCM"
    head: Prototypes

    def __init__(
        self, backbone: Backbone, *, similarity: Literal["euclidean", "cosine"] = "euclidean", **kwargs: Any
    ) -> None:
        super().__init__(backbone, **kwargs)
        self.head = Prototypes(backbone.feature_dim, similarity)
        self.variant = None if similarity == "euclidean" else similarity

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Refuse: there is nothing to train."""
        raise NotImplementedError("The nearest class mean has no loss: its means are measured, not trained.")

    def after_training(self, data: TrainingData) -> None:
        """Measure the mean of every new class."""
        self.head.write(
            class_means(self.features, data.plain(), self.experience.classes), self.experience.classes
        )
