"""EASE: an adapter and a subspace for every experience, and prototypes in all of them.

Every experience trains a bottleneck of its own, and all are kept. A new class has its mean feature under
every bottleneck so far; under later ones, whose images it never met, the prototype of an old class is put
together from those of newer classes, weighted by how similar these are where both were measured. An image is
compared with each class in all subspaces, in that of the class's own experience with the most weight.

Source: EASE, https://arxiv.org/abs/2403.12030, and https://github.com/sun-hailong/CVPR24-Ease.

==============================================  ===================================
paper                                           here
==============================================  ===================================
A_b, the adapter of task b                      ``renew``, used by ``using(b)``
P_{o,o}, P_{n,o}: measured prototypes           ``SubspacePrototypes.write``
w = softmax of cosines; P̂_{o,n} = w P_{n,n}     ``SubspacePrototypes.complete``
own subspace 1, others alpha                    ``SubspacePrototypes.weights``
==============================================  ===================================

Departures:

* Experiences may differ in size; the code derives the experience of a class from equal sizes.
* The learnt factor of the cosines is left out at test time, where it changes no prediction.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.contracts.bottleneck import BottleneckStrategy
from cl_bench.contracts.strategy import Promises, TrainingData
from cl_bench.data.experience import Experience
from cl_bench.maths.losses import cosine_similarities
from cl_bench.measure.means import class_means
from cl_bench.network.backbones import Backbone


class SubspacePrototypes(nn.Module):
    """A prototype of every class in the subspace of every experience.

    Args:
        feature_dim: Size of a feature, ``d``.
        alpha: Weight that all subspaces of other experiences share.

    Attributes:
        means: The prototypes (C, T, d) of C classes in T subspaces.
    """

    means: Tensor

    def __init__(self, feature_dim: int, alpha: float = 0.1) -> None:
        super().__init__()
        self.alpha = alpha
        self.sizes: list[int] = []
        self.register_buffer("means", torch.zeros(0, 0, feature_dim))

    @property
    def num_classes(self) -> int:
        """Number of classes seen."""
        return sum(self.sizes)

    @property
    def owner(self) -> Tensor:
        """Index of the experience of each class (C,)."""
        device = self.means.device
        every = torch.arange(len(self.sizes), device=device)
        return every.repeat_interleave(torch.tensor(self.sizes, device=device))

    def grow(self, num_classes: int) -> None:
        """Add a subspace and ``num_classes`` new classes, with prototypes of zero."""
        self.sizes.append(num_classes)
        self.means = F.pad(self.means, (0, 0, 0, 1, 0, num_classes))

    def write(self, means: Tensor) -> None:
        """Set the prototypes (C', T, d) of the newest classes, and complete those of all others."""
        self.means[-len(means) :].copy_(means)
        self.complete()

    def complete(self) -> None:
        """Put together the prototype of each class of experience i in every later subspace j.

        p_{c,j} = Σ_n softmax_n(cos(p_{c,i}, p_{n,i})) p_{n,j}, over the classes n of experience j and later.
        """
        owner = self.owner
        for j in range(1, len(self.sizes)):
            newer = self.means[owner >= j]
            for i in range(j):
                similar = cosine_similarities(self.means[owner == i, i], newer[:, i])
                self.means[owner == i, j] = similar.softmax(dim=1) @ newer[:, j]

    @property
    def weights(self) -> Tensor:
        """Weight of each subspace for each class (C, T)."""
        count = len(self.sizes)
        own = F.one_hot(self.owner, count).to(self.means.dtype)
        return own + (1 - own) * (self.alpha / max(1, count - 1))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (B, C) of features (B, T, d), one under each bottleneck."""
        pairs = zip(features.unbind(1), self.means.unbind(1), strict=True)
        cosines = torch.stack([cosine_similarities(f, p) for f, p in pairs], dim=2)
        with torch.autocast(features.device.type, enabled=False):
            return (cosines * self.weights).sum(dim=2)


class EASE(BottleneckStrategy):
    """An expandable ensemble of subspaces.

    Args:
        backbone: Pre-trained vision transformer.
        alpha: Weight that all subspaces of other experiences share.
        kwargs: Settings of every strategy with bottlenecks.
    """

    # Training meets a fresh bottleneck, and old prototypes are completed with every new class.
    promises = Promises(start_within=None, keeps_old_head=False, state_grows_with=("classes",))
    head: SubspacePrototypes

    def __init__(self, backbone: Backbone, *, alpha: float = 0.1, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.head = SubspacePrototypes(backbone.feature_dim, alpha)

    def expand(self, experience: Experience) -> None:
        """Add a subspace with a fresh bottleneck."""
        super().expand(experience)
        self.renew()

    def after_training(self, data: TrainingData) -> None:
        """Measure the new classes in every subspace, in one pass, and complete the others."""
        means = class_means(
            lambda images: self.subspaces(images).flatten(1), data.plain(), self.experience.classes
        )
        self.head.write(means.unflatten(1, (len(self.head.sizes), -1)))

    def subspaces(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to features (B, T, d), one under each bottleneck."""
        found = []
        for index in range(len(self.head.sizes)):
            with self.using(index):
                found.append(self.backbone(images))
        return torch.stack(found, dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, classes seen)."""
        logits: Tensor = self.head(self.subspaces(images))
        return logits
