from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.data.experience import Experience
from cl_bench.network.backbones import Backbone
from strategies.l2p import L2P

Making = Callable[..., Backbone]


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def drawn(backbone: Backbone, **settings: Any) -> L2P:
    """A pool of six prompts of two tokens, of which every image takes three, in double precision."""
    torch.manual_seed(0)
    strategy = L2P(backbone, **{"pool": 6, "length": 2, "chosen": 3} | settings)
    strategy.expand(Experience(0, 2, range(2)))
    return strategy.double()


def cosines(queries: Tensor, keys: Tensor) -> Any:
    q, k = queries.detach().numpy(), keys.detach().numpy()
    return q @ k.T / np.outer(np.linalg.norm(q, axis=1), np.linalg.norm(k, axis=1))


def test_features_are_those_of_a_transformer_written_by_hand(
    tiny_backbone: Making, by_hand: Callable[..., Tensor]
) -> None:
    strategy = drawn(tiny_backbone())
    vit = strategy.backbone.vit
    queries = torch.stack([by_hand(vit, image)[0] for image in images()])  # the class token
    common = F.normalize(queries.mean(dim=0), dim=0)
    strategy.keys.data -= strategy.keys.data @ common[:, None] * common  # so that images choose differently
    chosen = np.argsort(-cosines(queries, strategy.keys), axis=1)[:, :3]
    assert len({tuple(sorted(row)) for row in chosen}) > 1
    expected = []
    for image, prompts in zip(images(), chosen, strict=True):
        tokens = torch.cat([strategy.pool[prompt] for prompt in prompts]).detach()
        expected.append(by_hand(vit, image, tokens)[1 : 1 + 6].mean(dim=0))
    found = strategy.features(images())
    torch.testing.assert_close(found.pooled, torch.stack(expected), rtol=0, atol=1e-12)


def test_the_loss_falls_with_the_cosines_to_the_chosen_keys(tiny_backbone: Making) -> None:
    strategy, labels = drawn(tiny_backbone(), pull=0.5), torch.tensor([0, 1, 1, 0])
    features = strategy.features(images())
    chosen = np.sort(cosines(strategy.query(images()), strategy.keys), axis=1)[:, -3:]
    entropy = F.cross_entropy(strategy.head(features.pooled), labels)
    pull = (entropy - strategy.loss(features, labels)).item()
    assert pull == pytest.approx(0.5 * chosen.sum() / 4, abs=1e-12)
    assert abs(pull) <= 0.5 * 3


def test_only_chosen_prompts_and_keys_get_a_gradient(tiny_backbone: Making) -> None:
    strategy = drawn(tiny_backbone())
    strategy.batch_loss((images(1), torch.tensor([1]))).backward()
    chosen = set(np.argsort(-cosines(strategy.query(images(1)), strategy.keys)[0])[:3].tolist())
    for parameter in (strategy.keys, strategy.pool):
        assert parameter.grad is not None
        assert set(parameter.grad.flatten(1).any(dim=1).nonzero()[:, 0].tolist()) == chosen


def test_training_moves_the_pool_and_leaves_every_query_as_it_was(
    backbone: Making, walk: Callable[..., Any]
) -> None:
    pools: list[Tensor] = []

    class Watched(L2P):
        def before_training(self, data: Any) -> None:
            pools.append(self.pool.detach().clone())

    strategy, shown = Watched(backbone()), torch.rand(4, 3, 16, 16)
    before = strategy.query(shown)
    walk(strategy)
    assert torch.equal(strategy.query(shown), before)
    assert not any(torch.equal(one, other) for one, other in pairwise([*pools, strategy.pool]))


def test_more_prompts_than_there_are_is_refused(tiny_backbone: Making) -> None:
    with pytest.raises(ValueError, match=r"cannot take 11 of 10 prompts: set chosen .* from 1 to 10"):
        L2P(tiny_backbone(), chosen=11)
