"""TUNA: an adapter for every experience, chosen by the entropy of its prediction, and a universal one.

Every experience trains a bottleneck, which starts from the one before it, and all are kept. Their entrywise
merge, with the sign of the sum and the largest entry of that sign, is the universal bottleneck. At test time
an image passes under every bottleneck; the prediction of least entropy and that of the universal bottleneck
are averaged, so no task id is needed. After each experience all classifiers are aligned.

Source: TUNA, ICCV 2025, https://arxiv.org/abs/2508.08165, and a fork of its released code,
https://github.com/Ngahoang2005/ICCV2025-TUNA at 77d4f10, whose later commits change the method.

=================================================  ==============================================
released code                                      here
=================================================  ==============================================
``a_t``, a copy of the current adapter             ``renew``, bottleneck t + 1 of every block
CosFace over the classes of the experience         ``loss``
``1e-3 e^-(t+1) Σ_{i<t} |mean N(up_t) N(up_i)ᵀ|``  ``orthogonality``, ``overlap``
``emr_merge``: elect signs, take the largest       ``unified``, bottleneck 0 of every block
classifier alignment on Gaussians, logits 20 cos   ``ClassifierAlignment`` with ``ScaledCosine``
``argmin_i H(p_i)``; ``p_i + p_universal``         ``forward``
=================================================  ==============================================

Departures:

* The logits are the logarithm of the mean of the two probabilities. Predictions are those of their sum.
* The rate of the alignment falls once, as in SLCA. In the released code it has a period of ten epochs, so in
  thirty it falls and rises three times.
* ``alignment_decay`` shrinks the means of older classes most, as SLCA does. The released code divides a label
  by a negative number of classes and shrinks those of the newest most: ``decay_as_released`` does so too. The
  experience of a class is known here, so the first class of an experience counts as the others.
* The universal bottleneck is used in the first experience too, where it equals the only other one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.contracts.alignment import ClassifierAlignment
from cl_bench.contracts.bottleneck import Bottleneck, BottleneckStrategy
from cl_bench.contracts.strategy import Promises, TrainingData
from cl_bench.data.experience import Experience
from cl_bench.maths.losses import cosface
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import GrowingCosine, GrowingLinear, pooled


def unified(values: Tensor) -> Tensor:
    """Return the merge of ``values`` (T, …) over T: each entry has the sign of the sum, and its largest size.

    Source: EMR-Merging, https://arxiv.org/abs/2405.17461, without masks and rescalers. A sum of zero counts
    as negative, as in the released code.

    >>> unified(torch.tensor([[3.0, -1.0, 0.5], [1.0, 2.0, -4.0], [-2.0, 4.0, -1.0]]))
    tensor([ 3.,  4., -4.])
    """
    sign = torch.where(values.sum(dim=0) > 0, 1.0, -1.0).to(values.dtype)
    return sign * (sign * values).clamp(min=0).amax(dim=0)


class ScaledCosine(GrowingCosine):
    """Cosine classifiers whose logits have a scale, and which alignment overwrites.

    Args:
        feature_dim: Size of a feature, ``d``.
        scale: Factor of the cosines.
    """

    def __init__(self, feature_dim: int, scale: float) -> None:
        super().__init__(feature_dim)
        self.scale = scale

    @property
    def aligned(self) -> torch.nn.ModuleList:
        """What alignment writes to: the classifiers themselves."""
        return self.parts

    def forward(self, features: Tensor) -> Tensor:
        """Return the scaled cosines (B, classes seen) of features (B, d)."""
        return self.scale * super().forward(features)


class TUNA(ClassifierAlignment, BottleneckStrategy):
    """Specific bottlenecks with a universal one, and aligned cosine classifiers.

    Evaluation takes a pass for every experience so far, and one more.

    Args:
        backbone: Pre-trained vision transformer.
        margin: Margin of CosFace.
        cosine_scale: Factor of the cosines.
        orthogonality: Weight of the overlap with older bottlenecks, before it decays with the stream; 0 for
            none.
        bottleneck: Inner size of a bottleneck.
        alignment: Whether to align the classifiers.
        alignment_epochs: Passes over the drawn features.
        alignment_samples: Features drawn for each class in an epoch, and in a batch; published as five times
            the batch size.
        alignment_lr: Learning rate of the alignment.
        alignment_decay: Largest share of a mean that is taken away before features are drawn.
        decay_as_released: Whether the decay takes most from the newest classes.
        temperature: Divisor of normalised logits in the alignment; null to train on the scaled cosines.
        kwargs: Settings of the alignment, and of every strategy with bottlenecks.
    """

    # Old logits change with the number of classes that the entropy is over.
    promises = Promises(start_within=None, state_grows_with=("experiences",))
    small: ClassVar[Mapping[str, object]] = {**ClassifierAlignment.small, **BottleneckStrategy.small}
    head: ScaledCosine  # type: ignore[assignment]

    def __init__(
        self,
        backbone: Backbone,
        *,
        margin: float = 0.0,
        cosine_scale: float = 20.0,
        orthogonality: float = 1e-3,
        bottleneck: int = 16,
        alignment: bool = True,
        alignment_epochs: int = 30,
        alignment_samples: int = 80,
        alignment_lr: float = 5e-3,
        alignment_decay: float = 0.0,
        decay_as_released: bool = False,
        temperature: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            backbone,
            bottleneck=bottleneck,
            alignment=alignment,
            alignment_epochs=alignment_epochs,
            alignment_samples=alignment_samples,
            alignment_lr=alignment_lr,
            alignment_decay=alignment_decay,
            temperature=temperature,
            **kwargs,
        )
        self.margin = margin
        self.orthogonality = orthogonality
        self.decay_as_released = decay_as_released
        self.head = ScaledCosine(backbone.feature_dim, cosine_scale)
        self.variant = None if alignment else "without alignment"

    def expand(self, experience: Experience) -> None:
        """Grow the head, and continue with a copy of the newest bottleneck."""
        super().expand(experience)
        self.renew()

    def renew(self) -> None:
        """Freeze every bottleneck and add a copy of the newest; the universal one comes first."""
        settings = self.bottleneck, self.bottleneck_scale, self.bottleneck_dropout
        for block in self.adapted:
            if self.experience.is_first:
                block.bottlenecks.append(Bottleneck(self.backbone.feature_dim, *settings))
            block.bottlenecks.requires_grad_(False)
            block.bottlenecks.append(copy.deepcopy(block.bottlenecks[-1]).requires_grad_(True))
            block.used = len(block.bottlenecks) - 1

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        """Return CosFace over the classes of this experience, and the weighted overlap."""
        cosines, t = self.head.current(pooled(features)), self.experience.index
        start, scale = self.experience.classes.start, self.head.scale
        loss = cosface(cosines, labels, start, scale=scale, margin=self.margin)
        if t and self.orthogonality:
            loss = loss + self.orthogonality * math.exp(-(t + 1)) * self.overlap()
        return loss

    def overlap(self) -> Tensor:
        """Return Σ_{i<t} of the mean over the blocks of |mean of all entries of N(up_t) N(up_i)ᵀ|.

        N scales each row to length one; the mean of all products of rows is the product of the mean rows.
        """
        found = []
        for block in self.adapted:
            ups = [one.get_parameter("up.weight") for one in list(block.bottlenecks)[1:]]
            *old, new = (F.normalize(up, dim=1).mean(dim=0) for up in ups)
            found.append((torch.stack(old) * new).sum(dim=1).abs().sum())
        return torch.stack(found).mean()

    def after_training(self, data: TrainingData) -> None:
        """Merge all bottlenecks into the universal one, measure the new classes, and align."""
        super().after_training(data)
        for block in self.adapted:
            universal, *specific = block.bottlenecks
            for name, value in universal.named_parameters():
                value.copy_(unified(torch.stack([one.get_parameter(name) for one in specific])))

    def align(self, heads: GrowingLinear) -> None:
        """Train ``heads`` by their scaled cosines."""
        cosines = ScaledCosine(self.head.feature_dim, self.head.scale)
        cosines.parts = heads.parts
        super().align(cosines)

    def drawn(self) -> tuple[Tensor, Tensor]:
        """Return features (N, d), as many of each class seen, and their labels (N,)."""
        features, labels = super().drawn()
        if self.decay_as_released:  # a mean keeps 1 - δ - δ i / (t + 1), not 1 - δ + δ (i + 1) / (t + 1)
            sizes = torch.tensor(self.head.sizes, device=labels.device)
            owner = torch.arange(len(sizes), device=labels.device).repeat_interleave(sizes)
            excess = self.alignment_decay * (2 * owner + 1) / len(sizes)
            features = features - (excess[:, None] * self.means)[labels]
        return features, labels

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to the logarithm of their probabilities (B, classes seen)."""
        places = range(len(self.adapted[0].bottlenecks))
        universal, *specific = (self._log_probabilities(images, place) for place in places)
        every = torch.stack(specific, dim=1)  # (B, T, C)
        entropy = -(every.exp() * every).sum(dim=2)
        chosen = every[torch.arange(len(every), device=every.device), entropy.argmin(dim=1)]
        return torch.logaddexp(chosen, universal) - math.log(2)

    def _log_probabilities(self, images: Tensor, place: int) -> Tensor:
        with self.using(place):
            logits: Tensor = self.head(pooled(self.features(images)))
        return logits.log_softmax(dim=1)
