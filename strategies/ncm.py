"""Nearest class mean: no training, each class is its mean feature.

One pass over the training images of an experience, transformed as at test time, gives the mean feature of
each new class; an image gets the class whose mean is nearest. The result does not depend on the class order,
which makes it the baseline that every trained strategy has to beat. By cosine it is SimpleCIL.

Source: iCaRL's classifier without exemplars, https://arxiv.org/abs/1611.07725; SimpleCIL,
https://arxiv.org/abs/2303.07338.

==========================================  ==================================
paper                                       here
==========================================  ==================================
iCaRL: μ_y, mean feature of class y         ``class_means``
iCaRL: argmin over y of ‖φ(x) - μ_y‖        ``Prototypes``, ``euclidean``
SimpleCIL: cosine classifier of prototypes  ``Prototypes``, ``cosine``
==========================================  ==================================

Departures: None.
"""

from __future__ import annotations

from typing import Any, Literal

from cl_bench.contracts.strategy import Promises, Strategy, TrainingData
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
    promises = Promises(constant="features")
    head: Prototypes

    def __init__(
        self, backbone: Backbone, *, similarity: Literal["euclidean", "cosine"] = "euclidean", **kwargs: Any
    ) -> None:
        super().__init__(backbone, **kwargs)
        self.head = Prototypes(backbone.feature_dim, similarity)
        self.variant = "cosine" if similarity == "cosine" else None

    def after_training(self, data: TrainingData) -> None:
        """Measure the mean of every new class."""
        classes = self.experience.classes
        self.head.write(class_means(self.features, data.plain(), classes), classes)


class SimpleCIL(NearestClassMean):
    """Class means of frozen features, the most similar by cosine.

    Args:
        backbone: Pre-trained vision transformer.
        kwargs: Settings of every strategy.
    """

    name = "SimpleCIL"

    def __init__(self, backbone: Backbone, **kwargs: Any) -> None:
        super().__init__(backbone, similarity="cosine", **kwargs)
        self.variant = None
