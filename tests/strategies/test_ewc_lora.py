from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.contracts.strategy import TrainingData
from cl_bench.maths.losses import local_cross_entropy
from cl_bench.network.backbones import Backbone
from strategies.ewc_lora import EWCLoRA
from strategies.lora import LoRA

Walking = Callable[..., Any]
Making = Callable[..., Backbone]


def ewc_lora(backbone: Making, kind: type[EWCLoRA] = EWCLoRA, **settings: Any) -> EWCLoRA:
    how: dict[str, Any] = {"rank": 4, "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01)}
    return kind(backbone(), **how | settings)


def importance(strategy: EWCLoRA) -> list[Tensor]:
    return [strategy.get_buffer(f"importance_{number}").clone() for number in range(4)]


def test_without_strength_it_is_lora_bit_by_bit(backbone: Making, walk: Walking) -> None:
    ours, lora = ewc_lora(backbone, strength=0.0), LoRA(backbone(), rank=4)
    lora._optimizer = ours._optimizer
    walk(ours, seed=3)
    walk(lora, seed=3)
    for one, other in zip(ours.layers, lora.layers, strict=True):
        assert torch.equal(one.weight, other.weight)


def test_the_importance_is_that_of_gradients_formed_by_hand(backbone: Making, walk: Walking) -> None:
    """The gradient of a weight is that of its outputs times its inputs, seen by hooks on a plain layer."""
    expected: list[list[Tensor]] = []

    class Spied(EWCLoRA):
        def after_training(self, data: TrainingData) -> None:
            expected.append(self._by_hand(list(data.plain())))
            super().after_training(Plain(data))

        def _by_hand(self, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
            seen: dict[int, list[Tensor]] = {}

            def note(number: int) -> Any:
                def hook(layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
                    output.retain_grad()
                    seen[number] = [inputs[0], output]

                return hook

            handles = [layer.register_forward_hook(note(number)) for number, layer in enumerate(self.layers)]
            sums = [torch.zeros(32, 32) for _ in range(4)]
            images = sum(len(labels) for _, labels in batches)
            with torch.enable_grad():
                for pictures, labels in batches:
                    first = self.experience.classes.start
                    logits = self.head(self.backbone(pictures))[:, first:]
                    F.cross_entropy(logits, labels - first).backward()
                    for number, (inputs, output) in seen.items():
                        assert output.grad is not None
                        whole = torch.einsum("btm,btn->mn", output.grad, inputs.detach())
                        for place, rows in enumerate((slice(32, 64), slice(64, 96))):
                            sums[2 * number + place] += whole[rows].square() * len(labels) / images
            for handle in handles:
                handle.remove()
            return sums

    class Plain:
        def __init__(self, data: TrainingData) -> None:
            self.augmented = self.plain = data.plain

    strategy = ewc_lora(backbone, Spied)
    walk(strategy, batch_size=5)
    for number, found in enumerate(importance(strategy)):
        assert found.max() > 0
        torch.testing.assert_close(found, sum(one[number] for one in expected), rtol=1e-3, atol=1e-8)


def test_older_importance_decays_and_is_never_negative(backbone: Making, walk: Walking) -> None:
    found: list[list[Tensor]] = []

    class Spied(EWCLoRA):
        def after_training(self, data: TrainingData) -> None:
            super().after_training(data)
            found.append(importance(self))

    walk(ewc_lora(backbone, Spied, strength=0.0, decay=0.0), max_epochs=1)
    alone = found[:]
    found.clear()
    walk(ewc_lora(backbone, Spied, strength=0.0, decay=0.5), max_epochs=1)
    for number in range(4):
        halved = alone[2][number] + alone[1][number] / 2 + alone[0][number] / 4
        torch.testing.assert_close(found[2][number], halved, rtol=1e-4, atol=1e-10)
        assert (found[2][number] >= 0).all()


def test_the_penalty_is_the_double_sum_over_entries(backbone: Making, walk: Walking) -> None:
    strategy = ewc_lora(backbone, strength=50.0)
    walk(strategy, max_epochs=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, adapter in strategy.adapters():
            adapter.B.copy_(torch.randn(adapter.B.shape, generator=generator))
    expected = 0.0
    for (_, adapter), weights in zip(strategy.adapters(), importance(strategy), strict=True):
        B, A = adapter.B.detach().double(), adapter.A.detach().double()
        for row, of_row in zip(B, weights.double(), strict=True):
            for column, weight in zip(A.mT, of_row, strict=True):
                expected += float(weight * (row @ column) ** 2)
    features, labels = torch.randn(4, 32, generator=generator), torch.tensor([4, 5, 4, 5])
    entropy = local_cross_entropy(strategy.head(features)[:, 4:], labels, 4)
    found = (strategy.loss(features, labels) - entropy).item()
    assert found == pytest.approx(25 * expected, rel=1e-3)


def test_a_fresh_pair_has_neither_penalty_nor_its_gradient(backbone: Making, walk: Walking) -> None:
    strategy = ewc_lora(backbone)
    walk(strategy, max_epochs=1)
    penalty = strategy._penalty()  # the trained pairs were merged, which leaves B at zero
    penalty.backward()
    assert penalty == 0
    for _, adapter in strategy.adapters():
        assert adapter.A.grad is not None and adapter.B.grad is not None
        assert not adapter.A.grad.any() and not adapter.B.grad.any()


def test_strength_holds_important_weights_back(backbone: Making, walk: Walking) -> None:
    def moved(strength: float) -> float:
        strategy = ewc_lora(backbone, strength=strength)
        learnt = walk(strategy, max_epochs=4).learnt
        return sum(float(update.norm()) for update in learnt[2].updates)

    assert moved(1e7) < 0.5 * moved(0.0)
