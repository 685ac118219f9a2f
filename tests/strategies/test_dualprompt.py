from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.data.experience import Experience
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import GrowingLinear
from strategies.dualprompt import DualPrompt

Making = Callable[..., Backbone]


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def drawn(backbone: Backbone, **settings: Any) -> DualPrompt:
    """Three experiences whose experts and keys differ, in double precision."""
    torch.manual_seed(0)
    blocks: dict[str, Any] = {"general_blocks": [0], "expert_blocks": [1], "general_length": 2, "length": 3}
    strategy = DualPrompt(backbone, **blocks | settings)
    for index in range(3):
        strategy.expand(Experience(index, 3, range(2 * index, 2 * index + 2)))
        strategy.experts[index].data.normal_()
    return strategy.double()


def choosing(strategy: DualPrompt, order: list[int]) -> Tensor:
    """Images that choose these experts: the key of each is the query of one image."""
    shown = images(3)
    with torch.no_grad():
        for key, query in zip(strategy.keys, strategy.query(shown), strict=True):
            key.copy_(query)
    return shown[order]


@pytest.mark.parametrize(("general", "expert"), (([0], [1]), ([0, 1], [1])), ids=["apart", "in one block"])
def test_features_are_those_of_a_transformer_written_by_hand(
    general: list[int], expert: list[int], tiny_backbone: Making, by_hand: Callable[..., Tensor]
) -> None:
    strategy = drawn(tiny_backbone(), general_blocks=general, expert_blocks=expert).eval()
    vit, expected, choices = strategy.backbone.vit, [], []
    keys = np.stack([key.detach().numpy() for key in strategy.keys])
    for image in images(8):
        query = by_hand(vit, image)[0].numpy()
        choices.append(int(np.argmax(keys @ query / np.linalg.norm(keys, axis=1))))
        parts = [(block, pair) for block, pair in zip(general, strategy.general.detach(), strict=True)]
        parts += [(block, pair) for block, pair in zip(expert, strategy.experts[choices[-1]], strict=True)]
        prefixes = {
            block: tuple(torch.cat([pair[part] for at, pair in parts if at == block]) for part in (0, 1))
            for block in {*general, *expert}
        }
        expected.append(by_hand(vit, image, prefixes=prefixes)[0])
    assert len(set(choices)) > 1
    found = strategy.features(images(8)).pooled
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-12)


def test_training_uses_the_expert_and_the_key_of_the_experience(tiny_backbone: Making) -> None:
    strategy = drawn(tiny_backbone(), pull=0.5)
    shown, labels = choosing(strategy, [0, 1, 0]), torch.tensor([4, 5, 4])
    prompts, _ = strategy.prompts(strategy.query(shown))
    assert prompts.prefixes is not None
    keys, values = prompts.prefixes[1]
    assert torch.equal(keys, strategy.experts[2][0, 0].expand_as(keys))
    assert torch.equal(values, strategy.experts[2][0, 1].expand_as(values))
    features = strategy.features(shown)
    assert isinstance(strategy.head, GrowingLinear)
    entropy = F.cross_entropy(strategy.head.current(features.pooled), labels - 4)
    cosines = F.cosine_similarity(strategy.query(shown), strategy.keys[2][None])
    torch.testing.assert_close(strategy.loss(features, labels), entropy - 0.5 * cosines.mean())


def test_an_experience_trains_its_pair_and_the_general_prefix_only(
    backbone: Making, walk: Callable[..., Any]
) -> None:
    kept: list[list[Tensor]] = []

    class Watched(DualPrompt):
        def after_training(self, data: Any) -> None:
            kept.append([p.detach().clone() for p in (*self.experts, *self.keys, self.general)])

    strategy = Watched(backbone(), general_blocks=[0], expert_blocks=[1])
    walk(strategy)
    first, second, _ = kept
    assert torch.equal(strategy.experts[0], first[0]) and torch.equal(strategy.keys[0], first[1])
    assert torch.equal(strategy.experts[1], second[1]) and torch.equal(strategy.keys[1], second[3])
    assert not torch.equal(strategy.general, second[4])
    trained = {name for name, parameter in strategy.named_parameters() if parameter.requires_grad}
    assert trained == {"general", "experts.2", "keys.2", "head.parts.2.weight", "head.parts.2.bias"}


def test_a_new_expert_starts_from_the_one_before_it(tiny_backbone: Making) -> None:
    strategy = DualPrompt(tiny_backbone(), general_blocks=[0], expert_blocks=[1])
    strategy.expand(Experience(0, 2, range(2)))
    strategy.expand(Experience(1, 2, range(2, 4)))
    assert torch.equal(strategy.experts[1], strategy.experts[0])
    assert strategy.experts[1] is not strategy.experts[0]
    assert not torch.equal(strategy.keys[1], strategy.keys[0])


def test_key_and_value_of_an_image_come_from_the_expert_that_it_chose(tiny_backbone: Making) -> None:
    strategy = drawn(tiny_backbone()).eval()
    order = [2, 0]
    prompts, _ = strategy.prompts(strategy.query(choosing(strategy, order)))
    assert prompts.prefixes is not None
    keys, values = prompts.prefixes[1]
    for image, expert in enumerate(order):
        assert torch.equal(keys[image], strategy.experts[expert][0, 0])
        assert torch.equal(values[image], strategy.experts[expert][0, 1])


def test_the_ported_reshape_deals_key_parts_to_one_half_and_value_parts_to_the_other(
    tiny_backbone: Making,
) -> None:
    strategy = drawn(tiny_backbone(), ported_reshape=True).eval()
    order = [0, 1, 2, 0]
    prompts, _ = strategy.prompts(strategy.query(choosing(strategy, order)))
    assert prompts.prefixes is not None
    keys, values = prompts.prefixes[1]
    dealt = [(0, 0, 1), (0, 2, 3), (1, 0, 1), (1, 2, 3)]  # the part, and the two images that it comes from
    for image, (part, one, other) in enumerate(dealt):
        assert torch.equal(keys[image], strategy.experts[order[one]][0, part])
        assert torch.equal(values[image], strategy.experts[order[other]][0, part])
