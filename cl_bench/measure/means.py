"""Mean features of classes."""

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
