"""Real handwritten digits from scikit-learn, which need no download."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from torchvision.transforms import v2

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.data.sources import ArraySource, Sources
from cl_bench.data.stream import Transform
from cl_bench.data.views import floats

_TRAIN_SHARE = 0.8
_DARKEST = 16


class Digits(StreamDataModule):
    """The 1,797 digits of 8 × 8 pixels in scikit-learn, enlarged.

    The first 80 % of each class in the order of the dataset are training images and the others test images,
    so every seed has the same split. Neighbours in that order were often written by one hand: a random split
    would put them on both sides, and raise the accuracy of the nearest class mean of the pixels from 85 to
    90 %. Training shifts a digit by up to an eighth of its width, which is one of its own pixels.

    Source: test part of the UCI optical digits, https://doi.org/10.24432/C50P49.

    Args:
        num_experiences: Number of equal experiences, T; null if num_classes_per_experience is given.
        image_size: Height and width of the enlarged digits, in pixels.
        kwargs: As in every dataset.
    """

    name = "digits"
    decoding = "0 to 16 scaled to uint8, as RGB"

    def __init__(self, *, num_experiences: int | None = 5, image_size: int = 32, **kwargs: Any) -> None:
        super().__init__(num_experiences=num_experiences, image_size=image_size, **kwargs)

    def sources(self) -> Sources:
        """Load and split the digits."""
        ink, digits = load_digits(return_X_y=True)
        grey = torch.from_numpy(np.rint(ink * (255 / _DARKEST)).astype(np.uint8))
        images = grey.reshape(-1, 1, 8, 8).repeat(1, 3, 1, 1)
        train = _first_of_each_class(digits, _TRAIN_SHARE)
        return Sources(
            train=ArraySource(images[train], digits[train].tolist()),
            test=ArraySource(images[~train], digits[~train].tolist()),
            class_names=[str(digit) for digit in range(10)],
        )

    def train_transform(self) -> Transform:
        """Enlarge, then shift at random."""
        shift = v2.RandomCrop(self.image_size, padding=self.image_size // 8)
        return floats(self._enlargement, shift)

    def test_transform(self) -> Transform:
        """Enlarge."""
        return floats(self._enlargement)

    @property
    def _enlargement(self) -> v2.Transform:
        return v2.Resize((self.image_size, self.image_size))


def _first_of_each_class(labels: npt.NDArray[np.int64], share: float) -> npt.NDArray[np.bool_]:
    """Return whether each of ``labels`` (N,) is in the first ``share`` of its class, rounded down."""
    first = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        first[of_class[: int(share * len(of_class))]] = True
    return first
