"""Aligning the classifiers of all experiences after each, on features drawn from a Gaussian per class."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.contracts.strategy import Strategy, TrainingData
from cl_bench.data.experience import Experience
from cl_bench.measure.means import ClassCovariances
from cl_bench.measure.passes import measure
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import GrowingLinear

_JITTER = 1e-4  # added to every variance before sampling, as in the released code
_SPREAD = 0.01  # half the width of the uniform draw around ``drift``, as in the released code


class AlignedLinear(GrowingLinear):
    """Linear layers that experiences train, with a second set that classifies.

    Args:
        feature_dim: Size of a feature, ``d``.

    Attributes:
        aligned: The layers that classify, one for each experience.
    """

    def __init__(self, feature_dim: int) -> None:
        super().__init__(feature_dim)
        self.aligned = nn.ModuleList()

    def grow(self, num_classes: int) -> None:
        """Add a layer to both sets.

        Raises:
            ValueError: If there is no class to add.
        """
        super().grow(num_classes)
        self.aligned.append(copy.deepcopy(self.parts[-1]).requires_grad_(False))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (B, classes seen) of features (B, d), from the aligned layers."""
        return torch.cat([layer(features) for layer in self.aligned], dim=1)


class ClassifierAlignment(Strategy):
    """Retrains the heads of all experiences together after each one but the first, for use at test time.

    It precedes another strategy among the bases of a class. At the end of every experience it keeps mean and
    covariance of the features of each new class, from one pass over the training images as at test time. It
    then trains a copy of all heads by cross-entropy on features drawn from these Gaussians, and classifies
    with it. The heads that later experiences train, and the backbone, stay as they are.

    Source: SLCA, https://arxiv.org/abs/2303.05118, section 4.2; ``drift`` is from SLCA++,
    https://arxiv.org/abs/2408.08295.

    Args:
        backbone: Pre-trained vision transformer.
        alignment: Whether to align; without it nothing is measured or kept.
        covariance: ``full``, d² numbers for each class; or ``diagonal``, d.
        alignment_epochs: Passes over the drawn features; each draws anew.
        alignment_samples: Features drawn for each class in an epoch, and in a batch.
        alignment_lr: Learning rate of SGD, annealed by a cosine over the epochs.
        alignment_weight_decay: Weight decay of SGD.
        alignment_decay: Largest share δ of a mean that is taken away: that of a class of experience i is
            scaled by 1 - δ + δ (i + 1) / (t + 1) in experience t.
        drift: Relative shift u of features in an experience: drawn features are scaled by 1 / (1 + u' a), for
            u' uniform within 0.01 of u and a class that is a experiences old, and the weight of its aligned
            head by 1 + u a. 0 for neither.
        temperature: Divisor of the normalised logits; null to train on the logits as they are.
        kwargs: Settings of the other strategy.

    Attributes:
        means: Mean feature of each class (C, d).
        covariances: Covariance of each class (C, d, d), or its diagonal (C, d).
    """

    small: ClassVar[Mapping[str, object]] = {"alignment_epochs": 2, "alignment_samples": 8}
    head: AlignedLinear
    means: Tensor
    covariances: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        alignment: bool = False,
        covariance: Literal["full", "diagonal"] = "full",
        alignment_epochs: int = 5,
        alignment_samples: int = 256,
        alignment_lr: float = 0.01,
        alignment_weight_decay: float = 5e-4,
        alignment_decay: float = 0.1,
        drift: float = 0.0,
        temperature: float | None = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        self.alignment = alignment
        self.covariance = covariance
        self.alignment_epochs = alignment_epochs
        self.alignment_samples = alignment_samples
        self.alignment_lr = alignment_lr
        self.alignment_weight_decay = alignment_weight_decay
        self.alignment_decay = alignment_decay
        self.drift = drift
        self.temperature = temperature
        if not alignment:
            return
        width = backbone.feature_dim
        shape = (width,) if covariance == "diagonal" else (width, width)
        # A mean and a covariance for each class; the classifiers of old classes change on purpose.
        vectors = self.promises.vectors_per_class + 1 + (1 if covariance == "diagonal" else width)
        self.promises = replace(self.promises, vectors_per_class=vectors, keeps_old_head=False)
        if type(self.head) is not GrowingLinear:
            raise ValueError(
                f"Alignment trains linear heads, and {self.name} has a {type(self.head).__name__}: set "
                "alignment to false."
            )
        self.head = AlignedLinear(width)
        self.register_buffer("means", torch.zeros(0, width))
        self.register_buffer("covariances", torch.zeros(0, *shape))

    def expand(self, experience: Experience) -> None:
        """Make room for the new classes, their Gaussians included."""
        super().expand(experience)
        if self.alignment:
            for name in ("means", "covariances"):
                kept = self.get_buffer(name)
                new = kept.new_zeros(experience.num_classes, *kept.shape[1:])
                setattr(self, name, torch.cat([kept, new]))

    def after_training(self, data: TrainingData) -> None:
        """Finish the other strategy, measure the new classes, and align."""
        super().after_training(data)
        if not self.alignment:
            return
        classes = self.experience.classes
        moments = ClassCovariances(classes, diagonal=self.covariance == "diagonal")
        measure(self.features, data.plain(), moments)
        self.means[classes.start : classes.stop] = moments.mean()
        self.covariances[classes.start : classes.stop] = moments.covariance()
        heads = GrowingLinear(self.head.feature_dim)
        heads.parts = copy.deepcopy(self.head.parts)
        if not self.experience.is_first:
            with torch.enable_grad():
                self.align(heads.requires_grad_(True))
            for age, part in enumerate(reversed(heads.parts)):
                part.get_parameter("weight").mul_(1 + self.drift * age)
        self.head.aligned.load_state_dict(heads.parts.state_dict())

    def align(self, heads: GrowingLinear) -> None:
        """Train ``heads`` on drawn features."""
        optimizer = torch.optim.SGD(
            heads.parameters(), self.alignment_lr, momentum=0.9, weight_decay=self.alignment_weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.alignment_epochs)
        for _ in range(self.alignment_epochs):
            features, labels = self.drawn()
            order = torch.randperm(len(labels), device=labels.device)
            for batch in order.split(self.alignment_samples):
                logits = heads(features[batch])
                if self.temperature is not None:
                    logits = normalised(logits, heads.sizes) / self.temperature
                optimizer.zero_grad()
                F.cross_entropy(logits, labels[batch]).backward()
                optimizer.step()
            schedule.step()

    def drawn(self) -> tuple[Tensor, Tensor]:
        """Return features (N, d), as many of each class seen, and their labels (N,)."""
        count, (classes, width) = self.alignment_samples, self.means.shape
        noise = torch.randn(classes, count, width, device=self.means.device, dtype=self.means.dtype)
        if self.covariance == "diagonal":
            noise *= (self.covariances + _JITTER).sqrt()[:, None]
        else:
            eye = torch.eye(width, device=self.means.device, dtype=torch.float64)
            factors = torch.linalg.cholesky(self.covariances.double() + _JITTER * eye)
            noise = noise @ factors.to(noise.dtype).mT
        last = self.experience.index
        experiences = torch.arange(last + 1, device=self.means.device)
        owner = torch.repeat_interleave(experiences, torch.tensor(self.head.sizes, device=self.means.device))
        share = 1 - self.alignment_decay * (1 - (owner + 1) / (last + 1))
        features = noise + (share[:, None] * self.means)[:, None]
        if self.drift:
            moved = self.drift + _SPREAD * (2 * torch.rand_like(features[..., :1]) - 1)
            features = features / (1 + moved * (last - owner)[:, None, None])
        labels = torch.arange(classes, device=self.means.device).repeat_interleave(count)
        return features.flatten(0, 1), labels


def normalised(logits: Tensor, sizes: list[int]) -> Tensor:
    """Return logits (B, C) over the mean norm of an image's logits of each experience, ``sizes`` of them.

    >>> normalised(torch.tensor([[3.0, 4.0, 5.0]]), [2, 1])
    tensor([[0.6000, 0.8000, 1.0000]])
    """
    norms = [part.norm(dim=1, keepdim=True) for part in logits.split(sizes, dim=1)]
    return logits / (torch.cat(norms, dim=1).mean(dim=1, keepdim=True) + 1e-7)
