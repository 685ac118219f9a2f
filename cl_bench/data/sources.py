"""Where labelled images come from, and parts of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from cl_bench.data.stream import (
    Source,
)


@dataclass(frozen=True)
class Sources:
    """What a dataset brings.

    Attributes:
        train: Training images.
        test: Test images.
        class_names: Name of each original label.
        domains: Names of the domains that the images come from, if the dataset has any.
        train_domains: Place in ``domains`` of each training image, likewise.
        test_domains: Place in ``domains`` of each test image, likewise.
    """

    train: Source
    test: Source
    class_names: Sequence[str]
    domains: Sequence[str] = ()
    train_domains: Sequence[int] = ()
    test_domains: Sequence[int] = ()


class ArraySource:
    """A source held in memory.

    Args:
        images: Decoded images (N, 3, H, W), uint8.
        targets: Original labels (N,).
    """

    def __init__(self, images: Tensor, targets: Sequence[int]) -> None:
        self.images = images
        self.targets = list(targets)

    @property
    def fingerprint(self) -> str:
        """Sha256 of shape, pixels and labels."""
        shape_and_labels = np.array([*self.images.shape, *self.targets], dtype="<i8")
        return hashlib.sha256(shape_and_labels.tobytes() + self.images.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return image ``index`` (3, H, W) with its original label."""
        return self.images[index], self.targets[index]


class ChosenClasses:
    """The images of some classes of a source, which are numbered from 0 again.

    Args:
        source: Labelled images.
        labels: Which classes.

    Attributes:
        indices: Which images of the source these are (n,).
    """

    def __init__(self, source: Source, labels: range) -> None:
        targets = np.asarray(source.targets, dtype=np.int64)
        self._source = source
        self._labels = labels
        self.indices = np.flatnonzero((targets >= labels.start) & (targets < labels.stop))
        self.targets: list[int] = (targets[self.indices] - labels.start).tolist()

    @property
    def fingerprint(self) -> str:
        """Sha256 of the fingerprint of the source and the labels."""
        labels = f"{self._source.fingerprint} {self._labels.start} {self._labels.stop}"
        return hashlib.sha256(labels.encode()).hexdigest()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return image ``index`` with its new label."""
        image, label = self._source[int(self.indices[index])]
        return image, label - self._labels.start


def of_classes(found: Sources, labels: range) -> Sources:
    """Return the part of ``found`` that belongs to the classes ``labels``, numbered from 0 again."""
    train, test = ChosenClasses(found.train, labels), ChosenClasses(found.test, labels)
    return replace(
        found,
        train=train,
        test=test,
        class_names=[found.class_names[label] for label in labels],
        train_domains=[found.train_domains[i] for i in train.indices.tolist()] if found.domains else (),
        test_domains=[found.test_domains[i] for i in test.indices.tolist()] if found.domains else (),
    )
