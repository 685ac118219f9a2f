from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cl_bench.data.experience import Experience
from cl_bench.network.backbones import Backbone
from strategies.ncm import NearestClassMean


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


def test_the_variant_names_the_similarity_that_is_not_the_default(backbone: Backbone) -> None:
    assert NearestClassMean(backbone).variant is None
    assert NearestClassMean(backbone, similarity="cosine").variant == "cosine"
