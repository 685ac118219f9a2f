from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cl_bench.data.experience import Experience
from cl_bench.network.backbones import Backbone
from strategies.ncm import NearestClassMean, SimpleCIL


class Images:
    def __init__(self, labels: Tensor) -> None:
        self.labels = labels
        generator = torch.Generator().manual_seed(int(labels[0]))
        self.images = torch.rand(len(labels), 3, 8, 8, generator=generator)

    def augmented(self) -> list[tuple[Tensor, Tensor]]:
        raise AssertionError("class means are measured on plain images")

    def plain(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.images, self.labels)]


@pytest.fixture
def backbone(tiny_backbone: Callable[..., Backbone]) -> Backbone:
    return tiny_backbone()


def test_the_only_image_of_a_class_is_its_own_nearest_mean(backbone: Backbone) -> None:
    strategy = NearestClassMean(backbone)
    with torch.no_grad():
        for index in range(2):
            strategy.expand(Experience(index, 2, range(2 * index, 2 * index + 2)))
            data = Images(torch.tensor([2 * index, 2 * index + 1]))
            strategy.after_training(data)
            assert strategy(data.images).argmax(dim=1).tolist() == data.labels.tolist()
    assert strategy.head.means.shape == (4, backbone.feature_dim)


def test_there_is_nothing_to_train_and_no_loss(backbone: Backbone) -> None:
    strategy = NearestClassMean(backbone)
    strategy.expand(Experience(0, 1, range(2)))
    assert not strategy.trains
    with pytest.raises(NotImplementedError, match="measured, not trained"):
        strategy.loss(torch.zeros(1, 32), torch.tensor([0]))


def test_simplecil_is_nearest_class_mean_by_cosine(backbone: Backbone) -> None:
    assert (NearestClassMean(backbone).variant, SimpleCIL(backbone).variant) == (None, None)
    by_cosine = NearestClassMean(backbone, similarity="cosine")
    assert by_cosine.variant == "cosine"
    features = torch.randn(9, backbone.feature_dim, generator=torch.Generator().manual_seed(0))
    found = []
    for strategy in (by_cosine, SimpleCIL(backbone)):
        strategy.expand(Experience(0, 1, range(2)))
        strategy.head.write(features[:2], range(2))
        found.append(strategy.head(features))
    assert torch.equal(*found)


def test_simplecil_gives_the_same_class_whatever_the_length_of_a_feature(backbone: Backbone) -> None:
    strategy = SimpleCIL(backbone)
    strategy.expand(Experience(0, 1, range(2)))
    means = torch.eye(2, backbone.feature_dim)
    means[0] *= 3  # by distance, short features would be of the other class
    strategy.head.write(means, range(2))
    feature = torch.tensor([[0.6, 0.5] + [0.0] * (backbone.feature_dim - 2)])
    assert [int(strategy.head(scale * feature).argmax()) for scale in (0.01, 1, 100)] == [0, 0, 0]
