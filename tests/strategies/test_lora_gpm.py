from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cl_bench.backbones import Backbone
from cl_bench.measurements import second_moments
from cl_bench.rectification import relative_violation
from cl_bench.strategy import TrainingData
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


def test_the_memory_holds_the_energy_of_plain_training_images(backbone: Making, walk: Walking) -> None:
    held: list[float] = []

    class Spied(LoRAGPM):
        def after_training(self, data: TrainingData) -> None:
            moments = second_moments(self.features, self.layers, data.plain())
            super().after_training(data)
            held.extend(self.memory.held_energy(moments).tolist())

    walk(lora_gpm(backbone, Spied))
    assert len(held) == 6
    assert all(share >= bound for share, bound in zip(held, (0.8, 0.8, 0.83, 0.83, 0.86, 0.86), strict=True))


def test_projecting_one_gradient_alone_does_not_keep_the_update_off_protected_directions(
    backbone: Making, walk: Walking
) -> None:
    """That is the baseline; with safe rows it is kept off."""
    free, safe = (walk(lora_gpm(backbone, row_space=rows)).learnt[-1] for rows in ("free", "safe"))
    assert relative_violation(free.updates[0], free.bases[0].double()) > 1e-2
    assert relative_violation(safe.updates[0], safe.bases[0].double()) < 1e-5


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
def test_tables_say_which_parts_of_janus_lora_were_plugged_in(
    backbone: Making, settings: dict[str, Any], variant: str | None
) -> None:
    assert lora_gpm(backbone, **settings).variant == variant


def test_both_parts_of_janus_lora_plug_in(backbone: Making, walk: Walking) -> None:
    strategy = lora_gpm(backbone, rectification=True, decoupled_margin=True)
    plain = walk(lora_gpm(backbone)).losses
    assert walk(strategy).losses != plain
    assert strategy.prototypes.num_classes == 6


def test_layers_of_two_widths_are_refused(backbone: Making) -> None:
    with pytest.raises(ValueError, match="leave out fc2"):
        lora_gpm(backbone, targets=("k", "fc2"))
