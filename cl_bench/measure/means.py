"""Mean features of classes, and their covariances."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cl_bench.measure.passes import Statistic, measure
from cl_bench.network.heads import FeatureMap
from cl_bench.processes.ranks import total


class ClassMeans(Statistic):
    """The mean feature of each class, from sums kept in float64.

    Args:
        classes: Positions of the classes to measure; every label lies among them.
    """

    def __init__(self, classes: range) -> None:
        self.classes = classes
        self._sums: Tensor | None = None
        self._counts: Tensor | None = None

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add the features (B, d) and labels (B,) of one batch."""
        found = features.detach().double()
        if self._sums is None or self._counts is None:
            self._sums = found.new_zeros(len(self.classes), found.shape[1])
            self._counts = found.new_zeros(len(self.classes))
        self._sums.index_add_(0, labels - self.classes.start, found)
        self._counts += torch.bincount(labels - self.classes.start, minlength=len(self.classes))

    def mean(self) -> Tensor:
        """Return the means (len(classes), d), in float32.

        Raises:
            ValueError: If a class has no image.
        """
        if self._sums is not None and self._counts is not None:
            sums, counts = total(self._sums), total(self._counts)
            if bool(counts.all()):
                return (sums / counts[:, None]).float()
        raise ValueError(
            f"A class among positions {self.classes.start} to {self.classes.stop - 1} has no training image: "
            "add images, or leave the class out."
        )


class ClassCovariances(ClassMeans):
    """The mean feature of each class and the covariance around it, from sums kept in float64.

    Args:
        classes: Positions of the classes to measure; every label lies among them.
        diagonal: Whether to measure only the variance of each entry.

    >>> moments = ClassCovariances(range(2, 3))
    >>> moments.add(torch.tensor([[0.0, 1.0], [2.0, 5.0]]), torch.tensor([2, 2]))
    >>> moments.mean(), moments.covariance()
    (tensor([[1., 3.]]), tensor([[[2., 4.],
             [4., 8.]]]))
    """

    def __init__(self, classes: range, *, diagonal: bool = False) -> None:
        super().__init__(classes)
        self.diagonal = diagonal
        self._products: Tensor | None = None

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add the features (B, d) and labels (B,) of one batch."""
        super().add(features, labels)
        found = features.detach().double()
        if self._products is None:
            width = found.shape[1]
            shape = (width,) if self.diagonal else (width, width)
            self._products = found.new_zeros(len(self.classes), *shape)
        for label in labels.unique().tolist():
            own = found[labels == label]
            product = own.square().sum(dim=0) if self.diagonal else own.T @ own
            self._products[label - self.classes.start] += product

    def covariance(self) -> Tensor:
        """Return the unbiased covariances (C, d, d), or variances (C, d), in float32; 0 for a single image.

        Raises:
            ValueError: If a class has no image.
        """
        self.mean()  # refuses a class without images
        assert self._sums is not None and self._counts is not None and self._products is not None
        sums, counts, products = map(total, (self._sums, self._counts, self._products))
        outer = sums.square() if self.diagonal else sums[:, :, None] * sums[:, None, :]
        shape = (-1,) + (1,) * (outer.ndim - 1)
        spread = products - outer / counts.view(shape)
        return (spread / (counts - 1).clamp(min=1).view(shape)).float()


def class_means(features: FeatureMap, batches: Iterable[tuple[Tensor, Tensor]], classes: range) -> Tensor:
    """Return the mean feature of each class, (len(classes), d), in float32.

    Sums are kept in float64, so the means do not depend on the batch size beyond rounding.

    Args:
        features: Maps images (B, 3, H, W) to features (B, d).
        batches: Images and labels (B,); a label is a position in the class order and lies in ``classes``.
        classes: Positions of the classes to measure.

    Raises:
        ValueError: If a class has no image.

    >>> batches = [(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([2, 2, 3]))]
    >>> class_means(lambda images: images, batches, range(2, 4)).flatten()
    tensor([2., 5.])
    """
    means = ClassMeans(classes)
    measure(features, batches, means)
    return means.mean()
