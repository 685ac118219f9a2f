from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cl_bench.contracts.prompted import PromptedStrategy
from cl_bench.network.backbones import Backbone
from cl_bench.network.prompts import Prompts


class Offset(PromptedStrategy):
    """One prompt token: the query itself."""

    def prompts(self, query: Tensor) -> tuple[Prompts, Tensor | None]:
        return Prompts(query[:, None]), query[:, :2]


def test_the_query_is_the_frozen_feature_and_has_no_gradient(
    tiny_backbone: Callable[..., Backbone],
) -> None:
    strategy, images = Offset(tiny_backbone()), torch.rand(3, 3, 8, 8)
    found = strategy.query(images)
    assert torch.equal(found, strategy.backbone(images)) and not found.requires_grad


def test_prompts_are_made_from_whatever_query_returns(tiny_backbone: Callable[..., Backbone]) -> None:
    class Looked(Offset):
        def query(self, images: Tensor) -> Tensor:
            return torch.full((len(images), 32), 0.5)

    strategy, images = Looked(tiny_backbone()), torch.rand(3, 3, 8, 8)
    found = strategy.features(images)
    expected = strategy.backbone(images, Prompts(torch.full((1, 32), 0.5)))
    assert torch.equal(found.pooled, expected)
    assert found.extra.tolist() == [[0.5, 0.5]] * 3


def test_a_method_without_prompts_of_its_own_is_not_finished(
    tiny_backbone: Callable[..., Backbone],
) -> None:
    with pytest.raises(NotImplementedError):
        PromptedStrategy(tiny_backbone()).features(torch.rand(1, 3, 8, 8))
