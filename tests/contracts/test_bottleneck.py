from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.contracts.bottleneck import Bottleneck, BottleneckBlock, BottleneckStrategy
from cl_bench.data.experience import Experience
from cl_bench.network.backbones import Backbone

Making = Callable[..., Backbone]
FIRST, SECOND = Experience(0, 2, range(2)), Experience(1, 2, range(2, 4))


def filled(strategy: BottleneckStrategy) -> BottleneckStrategy:
    """Stand in for training: fill the newest up-projections with noise."""
    for block in strategy.adapted:
        newest: Any = block.bottlenecks[-1]
        torch.nn.init.normal_(newest.up.weight)
        torch.nn.init.normal_(newest.up.bias)
    return strategy.eval()


def test_a_bottleneck_adds_its_formula_to_the_input_of_the_second_norm(tiny_backbone: Making) -> None:
    torch.manual_seed(0)
    backbone = tiny_backbone()
    plain: Any = tiny_backbone().blocks[0]
    strategy = BottleneckStrategy(backbone, bottleneck=3)
    strategy.expand(FIRST)
    strategy.renew()
    a: Any = filled(strategy).adapted[0].bottlenecks[0]
    x = torch.randn(2, 5, 32)
    middle = x + plain.attn(plain.norm1(x))
    added = F.linear(F.linear(middle, a.down.weight, a.down.bias).clamp(min=0), a.up.weight, a.up.bias)
    torch.testing.assert_close(strategy.adapted[0](x), plain(x) + 0.1 * added)


def test_fresh_bottlenecks_change_no_bit_and_keep_the_names_of_the_backbone(tiny_backbone: Making) -> None:
    images, backbone = torch.rand(3, 3, 8, 8), tiny_backbone()
    before, names = backbone(images), set(backbone.state_dict())
    strategy = BottleneckStrategy(backbone, bottleneck=3)
    strategy.expand(FIRST)
    assert set(backbone.state_dict()) == names
    strategy.renew()
    assert torch.equal(backbone(images), before)
    assert all("bottlenecks" in name for name in set(backbone.state_dict()) - names)


def test_only_the_newest_bottleneck_is_trained_and_any_can_be_used(tiny_backbone: Making) -> None:
    images, features = torch.rand(3, 3, 8, 8), []
    strategy = BottleneckStrategy(tiny_backbone(), bottleneck=3)
    for experience in (FIRST, SECOND):
        strategy.expand(experience)
        strategy.renew()
        features.append(filled(strategy).features(images))
    trained = [name for name, p in strategy.named_parameters() if p.requires_grad and "bottlenecks" in name]
    assert len(trained) == 2 * 4 and all("bottlenecks.1." in name for name in trained)
    for index, expected in enumerate(features):
        with strategy.using(index):
            assert torch.equal(strategy.features(images), expected)
    assert torch.equal(strategy.features(images), features[1])


def test_training_drops_inner_units_and_evaluation_does_not() -> None:
    torch.manual_seed(0)
    bottleneck = Bottleneck(8, 64, dropout=0.5)
    torch.nn.init.normal_(bottleneck.up.weight)
    x: Tensor = torch.randn(4, 8)
    assert not torch.equal(bottleneck(x), bottleneck(x))
    bottleneck.eval()
    assert torch.equal(bottleneck(x), bottleneck(x))


def test_blocks_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="Bottlenecks need the blocks of a plain vision transformer"):
        BottleneckBlock(torch.nn.Linear(2, 2))
