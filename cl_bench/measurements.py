"""What one pass over the training images of an experience can measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def class_means(
    features: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], classes: range
) -> Tensor:
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
    sums: Tensor | None = None
    counts: Tensor | None = None
    for images, labels in batches:
        found = features(images).double()
        if sums is None or counts is None:
            sums = found.new_zeros(len(classes), found.shape[1])
            counts = found.new_zeros(len(classes))
        sums.index_add_(0, labels - classes.start, found)
        counts += torch.bincount(labels - classes.start, minlength=len(classes))
    if sums is None or counts is None or not bool(counts.all()):
        raise ValueError(
            f"A class among positions {classes.start} to {classes.stop - 1} has no training image: "
            "add images, or leave the class out."
        )
    return (sums / counts[:, None]).float()
