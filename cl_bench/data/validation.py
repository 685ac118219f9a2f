"""Training images held out to choose settings by, so that the test images stay closed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from cl_bench.data.stream import Indices, Source


class PartSource:
    """Some images of a source.

    Args:
        whole: The source.
        indices: Which of its images, in which order (n,).
    """

    def __init__(self, whole: Source, indices: Indices) -> None:
        self.whole = whole
        self.indices = indices
        self.targets: Sequence[int] = np.asarray(whole.targets, dtype=np.int64)[indices].tolist()

    @property
    def fingerprint(self) -> str:
        """Sha256 of the source's own and of the indices."""
        chosen = self.indices.astype("<i8").tobytes()
        return hashlib.sha256(self.whole.fingerprint.encode() + chosen).hexdigest()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return image ``index`` of the part with its original label."""
        return self.whole[int(self.indices[index])]


def held_out(targets: Sequence[int], fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Return the indices of the images that are kept (n,) and of those held out (m,), both ascending.

    Of every class the same share is held out, rounded, but at least one image, and at least one is kept.
    Which ones depends on the seed and the label alone, not on the other classes.

    Args:
        targets: Label of every image.
        fraction: Share of each class to hold out, above 0 and below 1.
        seed: Seed of the choice.

    Raises:
        ValueError: If a class has a single image.

    >>> kept, held = held_out([0] * 10 + [1] * 20, 0.1, seed=0)
    >>> len(kept), [int(index) // 10 for index in held]
    (27, [0, 1, 2])
    """
    labels = np.asarray(targets, dtype=np.int64)
    held = [
        _chosen(np.flatnonzero(labels == label), fraction, (seed, int(label))) for label in np.unique(labels)
    ]
    chosen = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def _chosen(of_class: Indices, fraction: float, entropy: tuple[int, int]) -> Indices:
    if len(of_class) < 2:
        raise ValueError(
            f"Class {entropy[1]} has a single training image, which cannot be both learnt and held out: "
            "set val_fraction to 0, or add images."
        )
    number = min(max(1, round(fraction * len(of_class))), len(of_class) - 1)
    # RandomState is frozen: its numbers are the same under every version of NumPy.
    generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(entropy)))
    return of_class[generator.permutation(len(of_class))[:number]]
