from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.contracts.strategy import TrainingData
from cl_bench.data.experience import Experience
from cl_bench.network.backbones import Backbone
from strategies.tuna import TUNA, unified

Making = Callable[..., Backbone]
Walking = Callable[..., Any]

QUICK: dict[str, Any] = {"bottleneck": 3, "alignment_epochs": 2, "alignment_samples": 8}


def images(count: int = 4) -> Tensor:
    return 50 * torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def drawn(backbone: Backbone, experiences: int, **settings: Any) -> TUNA:
    """Experiences of two classes each with random bottlenecks and heads, as if all were learnt."""
    torch.manual_seed(0)
    strategy = TUNA(backbone, **QUICK, **settings)
    for index in range(experiences):
        strategy.expand(Experience(index, experiences, range(2 * index, 2 * index + 2)))
    with torch.no_grad():
        for block in strategy.adapted:
            block.attn.get_submodule("qkv").get_parameter("weight").mul_(50)  # so that features differ
            for value in block.bottlenecks.parameters():
                value.normal_(std=0.3)
        for value in strategy.head.parameters():
            value.normal_()
    return strategy.eval()


class Watched(TUNA):
    """Notes the bottlenecks of the first block at the start and at the end of every experience."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.starts: list[list[Tensor]] = []
        self.ends: list[list[Tensor]] = []
        self.heads: list[list[Tensor]] = []

    def before_training(self, data: TrainingData) -> None:
        self.starts.append(self._bottlenecks())

    def after_training(self, data: TrainingData) -> None:
        self.heads.append(self._heads())
        super().after_training(data)
        self.ends.append(self._bottlenecks())
        self.heads.append(self._heads())

    def _bottlenecks(self) -> list[Tensor]:
        every = self.adapted[0].bottlenecks
        return [torch.nn.utils.parameters_to_vector(one.parameters()).detach().clone() for one in every]

    def _heads(self) -> list[Tensor]:
        return [part.get_parameter("weight").detach().clone() for part in self.head.parts]


@pytest.fixture
def watched(backbone: Making, walk: Walking) -> Watched:
    strategy = Watched(
        backbone(), **QUICK, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    )
    walk(strategy)
    return strategy


def test_a_bottleneck_starts_from_the_last_and_old_ones_stay(watched: Watched) -> None:
    for number, (start, end) in enumerate(zip(watched.starts, watched.ends, strict=True), 2):
        assert len(start) == len(end) == number
        assert not torch.equal(start[-1], end[-1])
        assert all(map(torch.equal, start[1:-1], end[1:-1]))
    for end, start in zip(watched.ends, watched.starts[1:], strict=False):
        assert all(map(torch.equal, end, start))
        assert torch.equal(start[-1], end[-1])


def test_the_universal_bottleneck_is_the_merge_of_all_others(watched: Watched) -> None:
    assert torch.equal(watched.ends[0][0], watched.ends[0][1])
    for universal, *specific in watched.ends:
        for entry, *values in zip(universal.tolist(), *(one.tolist() for one in specific), strict=True):
            positive = sum(values) > 0
            assert entry == max(map(abs, [value for value in values if (value > 0) == positive] or [0])) * (
                1 if positive else -1
            )


def test_a_merge_has_the_sign_of_the_sum_and_is_no_smaller_than_the_mean() -> None:
    values = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    found = unified(values)
    assert torch.equal(found.sign(), values.sum(dim=0).sign())
    assert (found.abs() >= values.mean(dim=0).abs()).all()
    assert torch.equal(unified(values[:1].expand(4, -1)), values[0])


def test_alignment_overwrites_the_heads_of_all_experiences(watched: Watched) -> None:
    before, after = watched.heads[::2], watched.heads[1::2]
    assert all(map(torch.equal, before[0], after[0]))
    for trained, aligned, start in zip(before[1:], after[1:], after, strict=False):
        assert not any(map(torch.equal, trained, aligned))
        assert all(map(torch.equal, start, trained))  # the old ones, which training leaves


@torch.no_grad()
def test_an_image_takes_the_prediction_of_least_entropy_and_the_universal_one(tiny_backbone: Making) -> None:
    strategy, chosen = drawn(tiny_backbone(), 3), set()
    for image, found in zip(images(12), strategy(images(12)), strict=True):
        probabilities = []
        for index in range(4):
            with strategy.using(index):
                feature = strategy.backbone(image[None])[0]
            cosines = [
                float(F.cosine_similarity(feature, row, dim=0))
                for part in strategy.head.parts
                for row in part.get_parameter("weight")
            ]
            probabilities.append(torch.tensor(cosines).mul(20).softmax(dim=0))
        universal, *specific = probabilities
        entropies = [scipy.stats.entropy(one.numpy()) for one in specific]
        chosen.add(entropies.index(min(entropies)))
        expected = (specific[entropies.index(min(entropies))] + universal) / 2
        torch.testing.assert_close(found.exp(), expected, atol=1e-5, rtol=1e-4)
    assert len(chosen) > 1


def test_a_prediction_changes_no_tensor_and_depends_on_no_other_image(tiny_backbone: Making) -> None:
    strategy = drawn(tiny_backbone(), 3)
    before = {name: value.clone() for name, value in strategy.state_dict().items() if torch.is_tensor(value)}
    together = strategy(images())
    alone = torch.cat([strategy(image[None]) for image in images()])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, strategy.state_dict()[name]) for name, value in before.items())


def test_the_overlap_is_the_mean_of_all_products_of_rows(tiny_backbone: Making) -> None:
    strategy = drawn(tiny_backbone(), 3)
    expected = torch.zeros(())
    for block in strategy.adapted:
        rows = [F.normalize(one.get_parameter("up.weight"), dim=1) for one in block.bottlenecks]
        expected += sum(((rows[3] @ rows[old].T).mean().abs() for old in (1, 2)), torch.zeros(())) / 2
    torch.testing.assert_close(strategy.overlap(), expected)


def test_the_loss_is_the_cross_entropy_of_20_cosines_and_a_decaying_overlap(tiny_backbone: Making) -> None:
    strategy = drawn(tiny_backbone(), 3, orthogonality=0.5)
    features, labels = strategy.features(images()), torch.tensor([4, 5, 5, 4])
    weight = strategy.head.parts[-1].get_parameter("weight")
    logits = 20 * F.cosine_similarity(features[:, None], weight[None], dim=2)
    expected = F.cross_entropy(logits, labels - 4) + 0.5 * torch.e**-3 * strategy.overlap()
    torch.testing.assert_close(strategy.loss(features, labels), expected)


@pytest.mark.parametrize("released", (False, True))
def test_means_decay_with_age_or_as_the_released_division_has_it(
    tiny_backbone: Making, released: bool
) -> None:
    strategy = drawn(tiny_backbone(), 3, alignment_decay=0.1, decay_as_released=released)
    strategy.means.copy_(torch.randn(6, 32, generator=torch.Generator().manual_seed(1)) * 1000)
    features, labels = strategy.drawn()
    for label in range(6):
        place = label // (-2 if released else 2)
        if released and label % 2 == 0:  # as its neighbour: the experience of a class is known here
            place = (label + 1) // -2
        mean = features[labels == label].mean(dim=0)
        share = float(mean @ strategy.means[label] / strategy.means[label].square().sum())
        assert share == pytest.approx(0.9 + 0.1 * (place + 1) / 3, abs=1e-4)
