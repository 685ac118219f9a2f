from __future__ import annotations

import pytest
import torch

from cl_bench.measure.means import class_means
from cl_bench.network.heads import Features


def test_class_means_equal_the_mean_over_all_images_of_a_class() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(50, 3, generator=generator)
    labels = torch.arange(50) % 4 + 6
    batches = list(zip(images.split(7), labels.split(7), strict=True))
    means = class_means(lambda x: x @ torch.eye(3), batches, range(6, 10))
    expected = torch.stack([images[labels == position].mean(dim=0) for position in range(6, 10)])
    torch.testing.assert_close(means, expected)
    with_extra = class_means(lambda x: Features(x @ torch.eye(3), extra="keys"), batches, range(6, 10))
    assert torch.equal(with_extra, means)


def test_a_class_without_images_has_no_mean() -> None:
    batches = [(torch.ones(2, 3), torch.tensor([0, 0]))]
    with pytest.raises(ValueError, match="has no training image"):
        class_means(lambda x: x, batches, range(2))
