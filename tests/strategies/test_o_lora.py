from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from cl_bench.contracts.strategy import TrainingData
from cl_bench.data.experience import Experience
from cl_bench.maths.losses import local_cross_entropy
from cl_bench.network.backbones import Backbone
from strategies.lora import LoRA
from strategies.o_lora import OLoRA

Walking = Callable[..., Any]
Making = Callable[..., Backbone]


def o_lora(backbone: Making, kind: type[OLoRA] = OLoRA, **settings: Any) -> OLoRA:
    how: dict[str, Any] = {"rank": 4, "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01)}
    return kind(backbone(), **how | settings)


def rows(strategy: OLoRA) -> list[Tensor]:
    return [adapter.A.detach().double() for _, adapter in strategy.adapters()]


def cosine(old: Tensor, new: Tensor) -> float:
    return float((old.double() @ new.double().mT).norm() / (old.double().norm() * new.double().norm()))


def test_without_strength_it_is_lora_bit_by_bit(backbone: Making, walk: Walking) -> None:
    ours, lora = o_lora(backbone, strength=0.0), LoRA(backbone(), rank=4)
    walk(ours, seed=3)
    lora._optimizer = ours._optimizer
    walk(lora, seed=3)
    for one, other in zip(ours.layers, lora.layers, strict=True):
        assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("overlap", ("squares", "absolute"))
def test_the_loss_adds_every_product_of_old_and_new_rows(
    backbone: Making, walk: Walking, overlap: Any
) -> None:
    strategy = o_lora(backbone, strength=0.7, overlap=overlap)
    walk(strategy, max_epochs=1)
    features, labels = torch.randn(6, 32), torch.tensor([4, 5] * 3)
    entropy = local_cross_entropy(strategy.head(features)[:, 4:], labels, 4)
    expected = 0.0
    for number, new in enumerate(rows(strategy)):
        old = strategy.get_buffer(f"old_{number}").double().numpy()
        products = np.einsum("in,jn->ij", old, new.numpy())
        expected += (products**2 if overlap == "squares" else np.abs(products)).sum()
    found = float((strategy.loss(features, labels) - entropy).detach())
    assert found == pytest.approx(0.7 * expected, rel=1e-4)


def test_the_first_experience_has_no_overlap(backbone: Making) -> None:
    strategy = o_lora(backbone, strength=100.0)
    strategy.expand(Experience(0, 3, range(2)))
    features, labels = torch.randn(4, 32), torch.tensor([0, 1, 0, 1])
    assert torch.equal(strategy.loss(features, labels), super(OLoRA, strategy).loss(features, labels))


def test_the_rows_of_every_experience_are_kept_as_they_were_trained(backbone: Making, walk: Walking) -> None:
    strategy = o_lora(backbone)
    learnt = walk(strategy).learnt
    for number in range(4):
        kept = strategy.get_buffer(f"old_{number}").split(4)
        assert len(kept) == 3
        assert all(torch.equal(one, its.down_at_end[number]) for one, its in zip(kept, learnt, strict=True))


def test_the_weight_holds_the_products_of_all_experiences(backbone: Making, walk: Walking) -> None:
    """Merging one after the other is what stacking all factors and multiplying once is."""
    stacked: list[tuple[list[Tensor], list[Tensor]]] = []

    class Spied(OLoRA):
        def after_training(self, data: TrainingData) -> None:
            pairs = [(one.B.detach().double(), one.A.detach().double()) for _, one in self.adapters()]
            stacked.append(tuple(map(list, zip(*pairs, strict=True))))  # type: ignore[arg-type]
            super().after_training(data)

    strategy = o_lora(backbone, Spied)
    first = [
        weight.double().clone() for weight in strategy.of_projections([_.weight for _ in strategy.layers])
    ]
    walk(strategy)
    ups, downs = zip(*stacked, strict=True)
    last = strategy.of_projections([layer.weight for layer in strategy.layers])
    for number, weight in enumerate(last):
        up = torch.cat([one[number] for one in ups], dim=1)
        down = torch.cat([one[number] for one in downs])
        torch.testing.assert_close(weight.double(), first[number] + up @ down, atol=1e-5, rtol=0)


def test_strength_turns_new_rows_away_from_old_ones(backbone: Making, walk: Walking) -> None:
    def plain(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.01)

    def overlaps(strength: float) -> list[float]:
        strategy = o_lora(backbone, strength=strength, optimizer=plain)
        learnt = walk(strategy, max_epochs=8).learnt
        return [cosine(learnt[0].down_at_end[n], learnt[1].down_at_end[n]) for n in range(4)]

    pushed, left = overlaps(50.0), overlaps(0.0)
    assert all(one < other for one, other in zip(pushed, left, strict=True))
    assert max(pushed) < 0.01


def test_two_fresh_pairs_overlap_as_their_start_says(backbone: Making) -> None:
    """Entries uniform within 1/√n have the variance 1/3n, so a product of two rows has 1/9n."""
    torch.manual_seed(0)
    strategy = o_lora(backbone, rank=8)
    strategy.expand(Experience(0, 3, range(2)))
    strategy.after_training(cast(TrainingData, None))
    strategy.expand(Experience(1, 3, range(2, 4)))
    assert strategy._overlap().item() == pytest.approx(4 * 8**2 / (9 * 32), rel=0.25)
