"""Features, and the classifiers that grow with the classes seen.

A head maps features (B, d) to one column for each class seen, in class order. It grows before it learns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.maths.losses import cosine_similarities

_MEANS_SCALE = 30.0


class Features(NamedTuple):
    """Features with whatever else the forward pass made that the loss needs.

    Attributes:
        pooled: Features (B, d), which a head classifies.
        extra: Anything, such as the similarity (B, k) of each image to the keys that it chose.
    """

    pooled: Tensor
    extra: Any


FeatureMap = Callable[[Tensor], Tensor | Features]
"""What maps images (B, 3, H, W) to features: a backbone, or the ``features`` of a strategy."""


def pooled(features: Tensor | Features) -> Tensor:
    """Return the features (B, d) that a head classifies.

    >>> pooled(Features(torch.zeros(4, 8), extra=None)).shape, pooled(torch.zeros(4, 8)).shape
    (torch.Size([4, 8]), torch.Size([4, 8]))
    """
    return features.pooled if isinstance(features, Features) else features


@runtime_checkable
class Head(Protocol):
    """What a strategy needs of a classifier, which is a module."""

    @property
    def num_classes(self) -> int:
        """Number of classes seen."""
        ...

    def grow(self, num_classes: int) -> None:
        """Make room for ``num_classes`` new classes."""
        ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield what may be trained, as a module does."""
        ...

    def __call__(self, features: Tensor) -> Tensor:
        """Return the logits (B, classes seen) of features (B, d)."""
        ...


@runtime_checkable
class TrainableHead(Head, Protocol):
    """A head that the default loss can train, one experience at a time."""

    def current(self, features: Tensor) -> Tensor:
        """Return the logits (B, classes of this experience) of features (B, d)."""
        ...


class GrowingLinear(nn.Module):
    """One linear layer for each experience; only the newest is trained.

    Args:
        feature_dim: Size of a feature, ``d``.
        bias: Whether the layers have a bias.

    >>> head = GrowingLinear(feature_dim=8)
    >>> head.grow(2)
    >>> head.grow(3)
    >>> head(torch.zeros(4, 8)).shape, head.current(torch.zeros(4, 8)).shape
    (torch.Size([4, 5]), torch.Size([4, 3]))
    """

    def __init__(self, feature_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.bias = bias
        self.parts = nn.ModuleList()

    @property
    def sizes(self) -> list[int]:
        """Number of classes of each part."""
        return [linear.out_features for linear in self._linears]

    @property
    def num_classes(self) -> int:
        """Number of classes seen."""
        return sum(self.sizes)

    def grow(self, num_classes: int) -> None:
        """Freeze what is there and add a part for ``num_classes`` new classes, drawn as PyTorch draws it.

        Raises:
            ValueError: If there is no class to add.
        """
        _require_classes(num_classes)
        self.parts.requires_grad_(False)
        self.parts.append(nn.Linear(self.feature_dim, num_classes, bias=self.bias))

    @torch.no_grad()
    def write_current(self, weight: Tensor) -> None:
        """Set the weight (C, d) of the newest part, in place, and its bias to zero.

        Raises:
            ValueError: If the shape is another.
        """
        newest = self._linears[-1]
        if weight.shape != newest.weight.shape:
            raise ValueError(
                f"A weight of shape {tuple(weight.shape)} does not fit the newest {newest.out_features} "
                f"classes: give a row of {self.feature_dim} for each."
            )
        newest.weight.copy_(weight)
        if newest.bias is not None:
            newest.bias.zero_()

    def start_from(self, means: Tensor) -> None:
        """Start the newest part from the mean feature (C, d) of each of its classes.

        Its logits are 30 times the cosine to each mean for features of average length, so that the heads of
        different experiences compare from the start.

        Source: the scale of the classifier of KeepLoRA+, https://arxiv.org/abs/2601.19659.
        """
        length = means.norm(dim=1).square().mean().sqrt()
        self.write_current(_MEANS_SCALE * F.normalize(means) / length)

    def current(self, features: Tensor) -> Tensor:
        """Return the logits (B, classes of the newest part) of features (B, d)."""
        logits: Tensor = self._linears[-1](features)
        return logits

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (B, classes seen) of features (B, d)."""
        return torch.cat([linear(features) for linear in self._linears], dim=1)

    @property
    def _linears(self) -> list[nn.Linear]:
        return [part for part in self.parts if isinstance(part, nn.Linear)]


class GrowingCosine(GrowingLinear):
    """One set of class weights for each experience, compared by angle; only the newest is trained.

    The logit of a class is the cosine between feature and weight, in [-1, 1]: a loss such as CosFace adds the
    scale and the margin.

    Source: the classifier of LoDA, https://arxiv.org/abs/2603.00191.

    Args:
        feature_dim: Size of a feature, ``d``.

    >>> head = GrowingCosine(feature_dim=2)
    >>> head.grow(2)
    >>> _ = head.parts[0].weight.data.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    >>> head(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]], grad_fn=<CatBackward0>)
    """

    def __init__(self, feature_dim: int) -> None:
        super().__init__(feature_dim, bias=False)

    def grow(self, num_classes: int) -> None:
        """Freeze what is there and add weights for ``num_classes`` new classes, normal with deviation 0.02.

        Raises:
            ValueError: If there is no class to add.
        """
        super().grow(num_classes)
        nn.init.trunc_normal_(self._linears[-1].weight, std=0.02)

    def current(self, features: Tensor) -> Tensor:
        """Return the cosines (B, classes of the newest part) of features (B, d)."""
        return cosine_similarities(features, self._linears[-1].weight)

    def forward(self, features: Tensor) -> Tensor:
        """Return the cosines (B, classes seen) of features (B, d)."""
        return torch.cat([cosine_similarities(features, linear.weight) for linear in self._linears], dim=1)


class Prototypes(nn.Module):
    """A mean feature for each class; the logit of a class is the similarity to its mean.

    Args:
        feature_dim: Size of a feature, ``d``.
        similarity: ``cosine`` of the angle between feature and mean, or ``euclidean``, the negative distance.

    >>> head = Prototypes(feature_dim=2)
    >>> head.grow(2)
    >>> head.write(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), range(0, 2))
    >>> head(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """

    means: Tensor

    def __init__(self, feature_dim: int, similarity: Literal["cosine", "euclidean"] = "cosine") -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.similarity = similarity
        self.sizes: list[int] = []
        self.register_buffer("means", torch.zeros(0, feature_dim))

    @property
    def num_classes(self) -> int:
        """Number of classes seen."""
        return sum(self.sizes)

    def grow(self, num_classes: int) -> None:
        """Add ``num_classes`` classes whose means are zero until they are written.

        Raises:
            ValueError: If there is no class to add.
        """
        _require_classes(num_classes)
        self.sizes.append(num_classes)
        self.means = torch.cat([self.means, self.means.new_zeros(num_classes, self.feature_dim)])

    def write(self, means: Tensor, classes: range) -> None:
        """Set the means (C, d) of the C positions in ``classes``.

        Raises:
            ValueError: If the head has no such classes or the shape is another.
        """
        if classes.start < 0 or classes.stop > self.num_classes:
            raise ValueError(
                f"Prototypes of {self.num_classes} classes do not have positions {classes.start} to "
                f"{classes.stop - 1}: grow the head first."
            )
        if means.shape != (len(classes), self.feature_dim):
            raise ValueError(
                f"Means of shape {tuple(means.shape)} do not fit {len(classes)} classes: "
                f"give a row of {self.feature_dim} for each."
            )
        self.means[classes.start : classes.stop].copy_(means)

    def forward(self, features: Tensor) -> Tensor:
        """Return the similarity (B, classes seen) of features (B, d) to each mean, in float32."""
        if self.similarity == "cosine":
            return cosine_similarities(features, self.means)
        with torch.autocast(features.device.type, enabled=False):
            # Through a matrix product, distances between close features would lose most of their digits.
            return -torch.cdist(
                features.float(), self.means.float(), compute_mode="donot_use_mm_for_euclid_dist"
            )


class RidgeHead(nn.Module):
    """Ridge regression from features, or random features of them, to one-hot labels, over all classes seen.

    With hidden features H (N, M), one row for each training image so far, and one-hot labels Y (N, C),

        W = (H^T H + ridge I)^-1 H^T Y,    logits = h W,

    so that only the sums H^T H and H^T Y are kept, and the solution is that of all experiences at once.

    Source: RanPAC, https://arxiv.org/abs/2307.02251, equations 4 to 6.

    Args:
        feature_dim: Size of a feature, ``d``.
        width: Number M of random features relu(f R), R standard normal; None for the features themselves.

    Attributes:
        gram: H^T H (M, M), in float64.
        sums: Y^T H (C, M), in float64.
        weight: W^T (C, M).

    >>> head = RidgeHead(feature_dim=1)
    >>> head.grow(2)
    >>> head.add(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]))
    >>> head.solve(ridge=2.0)
    >>> head(torch.tensor([[4.0]]))
    tensor([[ 1., -1.]])
    """

    projection: Tensor | None
    gram: Tensor
    sums: Tensor
    weight: Tensor

    def __init__(self, feature_dim: int, width: int | None = None) -> None:
        super().__init__()
        size = feature_dim if width is None else width
        self.register_buffer("projection", None if width is None else torch.zeros(feature_dim, width))
        # In float32 the rounding of the sums would outweigh the small ridges between which they choose.
        self.register_buffer("gram", torch.zeros(size, size, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(0, size, dtype=torch.float64))
        self.register_buffer("weight", torch.zeros(0, size))
        self.num_classes = 0

    def grow(self, num_classes: int) -> None:
        """Make room for ``num_classes`` new classes; the first call draws the projection.

        Raises:
            ValueError: If there is no class to add.
        """
        _require_classes(num_classes)
        if not self.num_classes and self.projection is not None:
            self.projection.normal_()
        self.num_classes += num_classes
        self.sums = F.pad(self.sums, (0, 0, 0, num_classes))
        self.weight = F.pad(self.weight, (0, 0, 0, num_classes))

    def hidden(self, features: Tensor) -> Tensor:
        """Return the hidden features (B, M) of features (B, d), in full precision."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.weight.dtype)
            return features if self.projection is None else (features @ self.projection).relu()

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add the features (B, d) and labels (B,) of training images to the sums."""
        hidden = self.hidden(features).double()
        self.gram += hidden.T @ hidden
        self.sums.index_add_(0, labels, hidden)

    def solve(self, ridge: float) -> None:
        """Set the weight to the solution for all that was added, computed in float64."""
        regular = self.gram.clone()
        regular.diagonal().add_(ridge)
        self.weight.copy_(torch.linalg.solve(regular, self.sums.T).T)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (B, classes seen) of features (B, d)."""
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(self.hidden(features), self.weight)


def _require_classes(num_classes: int) -> None:
    if num_classes < 1:
        raise ValueError(f"A head cannot grow by {num_classes} classes: give at least one.")
