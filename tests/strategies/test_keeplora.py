from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_bench.contracts.strategy import TrainingData
from cl_bench.data.experience import Experience
from cl_bench.maths.subspace import principal_subspace
from cl_bench.measure.gradients import full_weight_gradients
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import GrowingLinear, pooled
from strategies.keeplora import KeepLoRA

Walking = Callable[..., Any]
Making = Callable[..., Backbone]


def keeplora(backbone: Making, kind: type[KeepLoRA] = KeepLoRA, **changes: Any) -> KeepLoRA:
    settings: dict[str, Any] = {
        "rank": 4,
        "weight_threshold": 0.3,
        "feature_threshold": 0.7,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    }
    return kind(backbone(), **settings | changes)


def test_weights_with_adapters_start_where_they_were(backbone: Making, walk: Walking) -> None:
    for learnt in walk(keeplora(backbone)).learnt:
        for before, started in zip(learnt.weights, learnt.started, strict=True):
            assert (started - before).abs().max() < 1e-6
        for before, after in zip(learnt.weights, learnt.updates, strict=True):
            assert after.abs().max() > 1e-4 * before.abs().max()


def test_rows_are_orthonormal_outside_the_memory_and_never_trained(backbone: Making, walk: Walking) -> None:
    for learnt in walk(keeplora(backbone)).learnt:
        for down, later, basis in zip(learnt.down, learnt.down_at_end, learnt.bases, strict=True):
            assert torch.equal(down, later)
            assert basis.shape[1] > 0  # even in the first experience
            assert (down @ basis).abs().max() < 1e-6
            torch.testing.assert_close(down @ down.mT, torch.eye(4), atol=1e-6, rtol=0)


def test_a_weight_changes_only_within_the_span_of_its_rows(backbone: Making, walk: Walking) -> None:
    for learnt in walk(keeplora(backbone)).learnt:
        for update, down in zip(learnt.updates, learnt.down, strict=True):
            rows = down.double()
            torch.testing.assert_close(update, update @ rows.mT @ rows, atol=1e-6, rtol=0)


class Compared(KeepLoRA):
    """Compares the product that every adapter starts from with the best of its rank, by SVD."""

    compared = 0

    def before_training(self, data: TrainingData) -> None:
        of_layers = full_weight_gradients(
            lambda images, labels: self.loss(self.features(images), labels), self.layers, data.augmented()
        )
        super().before_training(data)
        for (projection, adapter), gradient in zip(
            self.adapters(), self.of_projections(of_layers), strict=True
        ):
            u, s, v = torch.linalg.svd(self.memory.right_residual(gradient.double(), projection))
            best = (u[:, :4] * s[:4]) @ v[:4]
            product = adapter.B.double() @ adapter.A.double()
            torch.testing.assert_close(product, best, atol=1e-6, rtol=1e-3)
            assert (product - best).norm() < 1e-4 * best.norm()
            self.compared += 1


@pytest.mark.parametrize("thresholds", ({}, {"weight_threshold": 0.0, "feature_threshold": 0.0}))
def test_adapters_start_as_the_best_approximation_of_the_residual_gradient(
    backbone: Making, walk: Walking, thresholds: dict[str, float]
) -> None:
    """Without thresholds nothing is protected, so that is the gradient as it is."""
    strategy = keeplora(backbone, Compared, **thresholds)
    walk(strategy, max_epochs=1)
    assert isinstance(strategy, Compared)
    assert strategy.compared == 3 * 8
    assert (strategy.memory.dims == [0] * 8) is bool(thresholds)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    (
        ({"targets": ("q", "fc1")}, "choose targets among q, k, v and proj"),
        ({"targets": ("q", "fc2")}, "choose targets among q, k, v and proj"),
        ({"targets": ("fc1",), "principal": "output"}, "set principal to input"),
    ),
)
def test_projections_that_differ_in_size_are_refused(
    backbone: Making, settings: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        keeplora(backbone, **settings)


@pytest.mark.parametrize("principal", ("input", "output"))
def test_the_memory_starts_from_the_principal_directions_of_the_weights(
    backbone: Making, principal: str
) -> None:
    strategy = keeplora(backbone, principal=principal)
    weights = strategy.of_projections([layer.weight for layer in strategy.layers])
    strategy.expand(Experience(0, 3, range(2)))
    for index, weight in enumerate(weights):
        side = weight if principal == "input" else weight.mT
        basis, directions = strategy.memory.basis(index), principal_subspace(side, 0.3)
        torch.testing.assert_close(basis @ basis.mT, directions @ directions.mT, atol=1e-5, rtol=0)


def test_a_head_starts_from_class_means_at_thirty_times_the_cosine(backbone: Making, walk: Walking) -> None:
    norms: list[Tensor] = []

    class Spied(KeepLoRA):
        def before_training(self, data: TrainingData) -> None:
            super().before_training(data)
            assert isinstance(self.head, GrowingLinear)
            features = torch.cat([pooled(self.features(images)) for images, _ in data.plain()])
            logits = self.head.current(features)
            norms.append(logits.abs().max() / 30)

    walk(keeplora(backbone, Spied), max_epochs=1)
    assert all(0.5 < norm < 1.5 for norm in norms)


def test_a_random_head_is_an_option(backbone: Making, walk: Walking) -> None:
    assert walk(keeplora(backbone, head_start="random")).losses != walk(keeplora(backbone)).losses


def test_token_averages_protect_fewer_directions_than_tokens(backbone: Making, walk: Walking) -> None:
    dims = []
    for statistic in ("second_moment", "batch_average"):
        strategy = keeplora(backbone, input_statistic=statistic, weight_threshold=0.0, feature_threshold=0.99)
        walk(strategy, max_epochs=1)
        dims.append(sum(strategy.memory.dims))
    assert dims[0] > dims[1] > 0


def test_with_a_full_memory_nothing_is_learnt_and_a_warning_appears(backbone: Making, walk: Walking) -> None:
    with pytest.warns(UserWarning, match="dimensions free, fewer than the rank"):
        walked = walk(keeplora(backbone, weight_threshold=1.0), max_epochs=1)
    assert all(update.abs().max() < 1e-6 for learnt in walked.learnt for update in learnt.updates)
    assert walked.result.status == "done"
