from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cl_bench.contracts.strategy import TrainingData
from cl_bench.maths.losses import decoupled_margin
from cl_bench.maths.violation import relative_violation
from cl_bench.measure.moments import second_moments
from cl_bench.network.backbones import Backbone
from strategies.lora_gpm import LoRAGPM

Walking = Callable[..., Any]
Making = Callable[..., Backbone]


def lora_gpm(backbone: Making, kind: type[LoRAGPM] = LoRAGPM, **changes: Any) -> LoRAGPM:
    settings: dict[str, Any] = {
        "rank": 4,
        "threshold": 0.8,
        "threshold_end": 0.9,
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    }
    return kind(backbone(), **settings | changes)


def test_the_memory_holds_the_energy_of_plain_training_images(
    backbone: Making, walk: Walking, held_energy: Callable[..., list[float]]
) -> None:
    held: list[float] = []

    class Spied(LoRAGPM):
        def after_training(self, data: TrainingData) -> None:
            moments = second_moments(self.features, self.layers, data.plain())
            super().after_training(data)
            held.extend(held_energy(self.memory, moments))

    walk(lora_gpm(backbone, Spied))
    assert len(held) == 6
    assert all(share >= bound for share, bound in zip(held, (0.8, 0.8, 0.83, 0.83, 0.86, 0.86), strict=True))


def test_projecting_only_one_gradient_lets_the_update_act_on_protected_directions(
    backbone: Making, walk: Walking
) -> None:
    """That is the baseline; with safe rows the update does not act on them."""
    free, safe = (walk(lora_gpm(backbone, row_space=rows)).learnt[-1] for rows in ("free", "safe"))
    for projection in range(4):
        assert relative_violation(free.updates[projection], free.bases[projection].double()) > 1e-2
        assert relative_violation(safe.updates[projection], safe.bases[projection].double()) < 1e-5


def test_the_gradient_of_a_has_no_protected_direction_at_any_step(backbone: Making, walk: Walking) -> None:
    largest = 0.0

    class Spied(LoRAGPM):
        def rectify_gradients(self) -> None:
            nonlocal largest
            super().rectify_gradients()
            for index, adapter in self.adapters():
                assert adapter.A.grad is not None
                largest = max(largest, float(relative_violation(adapter.A.grad, self.memory.basis(index))))

    walk(lora_gpm(backbone, Spied))
    assert 0 < largest < 1e-4


@pytest.mark.parametrize(
    ("settings", "variant"),
    (({}, None), ({"rectification": True}, "GR"), ({"decoupled_margin": True}, "DML")),
)
def test_the_variant_names_the_parts_of_janus_lora_that_are_plugged_in(
    backbone: Making, settings: dict[str, Any], variant: str | None
) -> None:
    assert lora_gpm(backbone, **settings).variant == variant


def test_rectification_plugs_in_and_keeps_the_composite_near_the_projected_gradient(
    backbone: Making, walk: Walking
) -> None:
    """At the first step ``B`` is zero: the rectified gradient of ``A`` is zero, that of ``B`` is not."""
    first: list[tuple[float, float]] = []

    class Spied(LoRAGPM):
        def rectify_gradients(self) -> None:
            super().rectify_gradients()
            for _, adapter in self.adapters():
                if not adapter.B.any():
                    assert adapter.A.grad is not None and adapter.B.grad is not None
                    first.append((float(adapter.A.grad.norm()), float(adapter.B.grad.norm())))

    walk(lora_gpm(backbone, Spied, rectification=True))
    assert len(first) == 3 * 4
    assert all(of_A == 0 and of_B > 0 for of_A, of_B in first)
    plain = walk(lora_gpm(backbone)).losses
    assert walk(lora_gpm(backbone, rectification=True)).losses[1:6] != plain[1:6]


def test_the_margin_plugs_in_by_adding_its_term(backbone: Making, walk: Walking) -> None:
    strategy = lora_gpm(backbone, decoupled_margin=True, margin_weight=0.7)
    walk(strategy)
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(6, 32, generator=generator), torch.tensor([4, 5] * 3)
    with_margin = strategy.loss(features, labels)
    strategy.decoupled_margin = False
    term = 0.7 * decoupled_margin(features, strategy.prototypes.means[:4], 0.2)
    assert term > 0
    torch.testing.assert_close(with_margin - strategy.loss(features, labels), term)
