from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cl_bench.network.backbones import Backbone
from strategies.ease import EASE, SubspacePrototypes

Making = Callable[..., Backbone]


@pytest.fixture
def head() -> SubspacePrototypes:
    """Two classes, then one, then two, measured in all subspaces up to their own."""
    generator = torch.Generator().manual_seed(0)
    head = SubspacePrototypes(feature_dim=4, alpha=0.1)
    for size in (2, 1, 2):
        head.grow(size)
        head.write(torch.randn(size, len(head.sizes), 4, generator=generator))
    return head


def test_an_old_prototype_is_a_mean_of_newer_ones_weighted_by_similarity(head: SubspacePrototypes) -> None:
    p = head.means
    for c, i, j, newer in ((0, 0, 1, [2, 3, 4]), (1, 0, 2, [3, 4]), (2, 1, 2, [3, 4])):
        weights = [float(cosine_similarity(p[c, i], p[n, i], dim=0).exp()) for n in newer]
        expected = sum(weight * p[n, j] for weight, n in zip(weights, newer, strict=True)) / sum(weights)
        torch.testing.assert_close(p[c, j], expected)


def test_equal_newer_prototypes_are_returned_because_weights_sum_to_one(head: SubspacePrototypes) -> None:
    head.means[2:, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    head.complete()
    torch.testing.assert_close(head.means[:2, 1], torch.tensor([[1.0, 2.0, 3.0, 4.0]]).expand(2, 4))


def test_completion_leaves_what_was_measured(head: SubspacePrototypes) -> None:
    before = head.means.clone()
    head.grow(1)
    head.write(torch.ones(1, 4, 4))
    for c, i in enumerate((0, 0, 1, 2, 2)):
        assert torch.equal(head.means[c, : i + 1], before[c, : i + 1])


def test_the_own_subspace_has_weight_one_and_the_others_share_alpha(head: SubspacePrototypes) -> None:
    expected = [[1, 0.05, 0.05], [1, 0.05, 0.05], [0.05, 1, 0.05], [0.05, 0.05, 1], [0.05, 0.05, 1]]
    torch.testing.assert_close(head.weights, torch.tensor(expected))
    features = torch.randn(3, 3, 4)
    own = cosine_similarity(features[:, 1], head.means[2, 1])
    others = [cosine_similarity(features[:, j], head.means[2, j]) for j in (0, 2)]
    torch.testing.assert_close(head(features)[:, 2], own + 0.05 * (others[0] + others[1]))


def test_with_one_subspace_the_logits_are_plain_cosines() -> None:
    head = SubspacePrototypes(feature_dim=2)
    head.grow(2)
    head.write(torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]]))
    torch.testing.assert_close(head(torch.tensor([[[3.0, 4.0]]])), torch.tensor([[0.6, 0.8]]))


class Adapters(Callback):
    """The bottlenecks and prototypes after every experience."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        state = pl_module.state_dict().items()
        self.seen.append({name: value.clone() for name, value in state if "bottlenecks" in name})


def test_old_bottlenecks_stay_and_every_experience_has_its_own(backbone: Making) -> None:
    from cl_bench.loop.trainer import StreamTrainer
    from datamodules.toy import Toy

    adapters, strategy = Adapters(), EASE(backbone(), bottleneck=4)
    trainer = StreamTrainer(max_epochs=1, accelerator="cpu", callbacks=[adapters])
    trainer.run(strategy, Toy(num_classes=6, num_experiences=3, image_size=16, batch_size=8))
    first, second, third = adapters.seen
    assert len(first) * 3 == len(second) * 3 / 2 == len(third) == 3 * 2 * 4
    for before, after in ((first, second), (second, third)):
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    images = torch.rand(4, 3, 16, 16)
    strategy.eval()
    with torch.no_grad():
        subspaces = strategy.subspaces(images)
        assert torch.equal(subspaces[:, -1], strategy.features(images))
        assert not torch.equal(subspaces[:, 0], subspaces[:, 1])
