from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from cl_bench.contracts.strategy import TrainingData
from cl_bench.maths.memory import GPM, reaching
from cl_bench.maths.subspace import energy_threshold, leading_directions
from cl_bench.maths.violation import relative_violation
from cl_bench.measure.moments import second_moments
from cl_bench.network.backbones import Backbone
from strategies.inflora import InfLoRA

Walking = Callable[..., Any]
Making = Callable[..., Backbone]


def inflora(backbone: Making, kind: type[InfLoRA] = InfLoRA, **changes: Any) -> InfLoRA:
    settings: dict[str, Any] = {
        "rank": 4,
        "threshold": 0.98,
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    }
    return kind(backbone(), **settings | changes)


def test_rows_are_orthonormal_over_root_three_and_never_trained(backbone: Making, walk: Walking) -> None:
    for learnt in walk(inflora(backbone)).learnt:
        for down, at_end in zip(learnt.down, learnt.down_at_end, strict=True):
            assert torch.equal(down, at_end)
            torch.testing.assert_close(3 * down @ down.mT, torch.eye(4), atol=1e-6, rtol=0)


def test_keys_and_values_share_their_rows_and_their_basis(backbone: Making, walk: Walking) -> None:
    for learnt in walk(inflora(backbone)).learnt:
        for found in (learnt.down, learnt.bases):
            assert len(found) == 4
            assert all(map(torch.equal, found[::2], found[1::2]))


COMPLEMENT = {"energy": "features", "threshold": 0.995, "threshold_end": 0.998}
"""These protect more than half of the dimensions, so that a dual memory stores the others."""


@pytest.mark.parametrize("settings", ({}, {"memory_form": "plain"}, COMPLEMENT))
def test_updates_act_on_nothing_that_the_memory_protects(
    backbone: Making, walk: Walking, settings: dict[str, Any]
) -> None:
    strategy = inflora(backbone, **settings)
    for learnt in walk(strategy).learnt[1:]:
        for down, update, basis in zip(learnt.down, learnt.updates, learnt.bases, strict=True):
            assert basis.shape[1] > 0
            assert (down @ basis).abs().max() < 1e-6
            assert relative_violation(update, basis.double()) < 1e-5
    assert ("complement_0" in strategy.memory.state_dict()) is (settings is COMPLEMENT)


def test_the_first_experience_learns_along_the_principal_directions_of_its_inputs(
    backbone: Making, walk: Walking
) -> None:
    found: list[torch.Tensor] = []

    class Spied(InfLoRA):
        def before_training(self, data: TrainingData) -> None:
            moments = second_moments(self.features, self.layers, data.augmented())
            super().before_training(data)
            found.append(moments[self.layer_of])

    first = walk(inflora(backbone, Spied), max_epochs=1).learnt[0]
    principal = leading_directions(found[0], 4)
    for down, directions in zip(first.down, principal, strict=True):
        projector = 3 * down.double().mT @ down.double()
        torch.testing.assert_close(projector, directions @ directions.mT, atol=1e-6, rtol=0)


def test_the_energy_of_features_needs_more_directions_than_that_of_the_covariance(
    backbone: Making, walk: Walking
) -> None:
    dims = {}
    for energy in ("features", "covariance"):
        strategy = inflora(backbone, energy=energy, threshold=0.9, threshold_end=0.9)
        walk(strategy)
        dims[energy] = strategy.memory.dims
    assert all(one > other for one, other in zip(dims["features"], dims["covariance"], strict=True))


def test_the_memory_only_grows(backbone: Making, walk: Walking) -> None:
    widths = [[basis.shape[1] for basis in learnt.bases] for learnt in walk(inflora(backbone)).learnt]
    assert all(
        one <= other for before, after in pairwise(widths) for one, other in zip(before, after, strict=True)
    )
    assert sum(widths[-1]) > 0


def test_the_memory_holds_the_share_of_the_schedule(
    backbone: Making, walk: Walking, held_energy: Callable[..., list[float]]
) -> None:
    held: list[list[float]] = []

    class Spied(InfLoRA):
        def after_training(self, data: TrainingData) -> None:
            moments = second_moments(self.features, self.layers, data.augmented())
            super().after_training(data)
            held.append(held_energy(self.memory, moments))

    walk(inflora(backbone, Spied, threshold=0.9, threshold_end=0.96, energy="features"))
    assert len(held) == 3
    assert all(
        share >= bound - 1e-6
        for shares, bound in zip(held, (0.9, 0.92, 0.94), strict=True)
        for share in shares
    )


def test_with_the_covariance_the_first_experience_takes_one_direction_fewer(
    backbone: Making, walk: Walking
) -> None:
    counted: list[tuple[list[int], list[int]]] = []

    class Spied(InfLoRA):
        def after_training(self, data: TrainingData) -> None:
            moments = second_moments(self.features, self.layers, data.augmented(), torch.float32)
            papers = GPM(self.layer_of, self.memory.dim, "covariance", torch.float32)
            for projection in range(len(self.layer_of)):
                papers.replace(projection, self.memory.basis(projection))
            at = self.experience.index
            papers.update(moments, reaching(energy_threshold(at, 3, 0.99, 1.0)))
            super().after_training(data)
            counted.append((papers.dims, self.memory.dims))

    walk(inflora(backbone, Spied, threshold=0.99), max_epochs=1)
    (paper, first), *later = counted
    assert min(paper) > 1
    assert first == [dims - 1 for dims in paper]
    assert all(paper == ours for paper, ours in later)


def test_fewer_free_directions_than_the_rank_stop_the_run(backbone: Making, walk: Walking) -> None:
    with pytest.raises(ValueError, match=r"dimensions free, fewer than the rank \d+: lower the rank"):
        walk(inflora(backbone, threshold=1.0, energy="features"), max_epochs=1)


def test_only_the_chosen_blocks_carry_adapters_and_bases(backbone: Making) -> None:
    strategy = inflora(backbone, blocks=[0], memory_form="plain")
    assert len(strategy.layers) == 1
    assert strategy.memory.projections == [0, 0]
