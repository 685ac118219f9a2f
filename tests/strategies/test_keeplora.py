from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_bench.contracts.strategy import TrainingData
from cl_bench.data.experience import Experience
from cl_bench.maths.subspace import principal_output_subspace, principal_subspace
from cl_bench.measure.gradients import full_weight_gradients
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import GrowingLinear
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


def per_adapter(strategy: KeepLoRA, matrices: list[Tensor]) -> list[Tensor]:
    return [
        matrix[rows]
        for layer, matrix in zip(strategy.layers, matrices, strict=True)
        for rows in layer.rows.values()
    ]


def test_weights_with_adapters_start_where_they_were(backbone: Making, walk: Walking) -> None:
    for learnt in walk(keeplora(backbone)).learnt:
        for before, started in zip(learnt.weights, learnt.started, strict=True):
            assert (started - before).abs().max() < 1e-6
        for before, after in zip(learnt.weights, learnt.updates, strict=True):
            assert after.abs().max() > 1e-4 * before.abs().max()


def test_rows_are_orthonormal_outside_the_memory_and_never_trained(backbone: Making, walk: Walking) -> None:
    for learnt in walk(keeplora(backbone)).learnt:
        downs = [factors[name] for factors in learnt.down for name in factors]
        at_end = [factors[name] for factors in learnt.down_at_end for name in factors]
        for down, later, basis in zip(downs, at_end, learnt.bases, strict=True):
            assert torch.equal(down, later)
            assert basis.shape[1] > 0  # the first experience is projected, too
            assert (down @ basis).abs().max() < 1e-6
            torch.testing.assert_close(down @ down.mT, torch.eye(4), atol=1e-6, rtol=0)


def test_a_weight_changes_within_the_span_of_its_rows_alone(backbone: Making, walk: Walking) -> None:
    strategy = keeplora(backbone)
    for learnt in walk(strategy).learnt:
        downs = [factors[name].double() for factors in learnt.down for name in factors]
        for update, down in zip(per_adapter(strategy, learnt.updates), downs, strict=True):
            torch.testing.assert_close(update, update @ down.mT @ down, atol=1e-6, rtol=0)


def test_adapters_start_as_the_best_approximation_of_the_residual_gradient(
    backbone: Making, walk: Walking
) -> None:
    checked = 0

    class Spied(KeepLoRA):
        def before_training(self, data: TrainingData) -> None:
            nonlocal checked
            super().before_training(data)
            for layer in self.layers:  # back to the weights that the gradient was taken of
                for name, rows in layer.rows.items():
                    layer.weight[rows] += layer.adapter(name).delta()
            products = [layer.adapter(name).B for layer in self.layers for name in layer.rows]
            kept = [up.clone() for up in products]
            for up in products:
                up.zero_()
            gradients = per_adapter(self, full_weight_gradients(self._loss_of, self.layers, data.augmented()))
            for up, old in zip(products, kept, strict=True):
                up.copy_(old)
            for layer in self.layers:
                layer.subtract()
            for index, ((_, adapter), gradient) in enumerate(zip(self.adapters(), gradients, strict=True)):
                residual = self.memory.right_residual(gradient.double(), index)
                u, s, v = torch.linalg.svd(residual)
                best = (u[:, :4] * s[:4]) @ v[:4]
                product = adapter.B.double() @ adapter.A.double()
                torch.testing.assert_close(product, best, atol=1e-6, rtol=1e-3)
                checked += 1

    walk(keeplora(backbone, Spied), max_epochs=1)
    assert checked == 3 * 2 * 4


def test_without_thresholds_adapters_start_from_the_gradient_as_it_is(
    backbone: Making, walk: Walking
) -> None:
    compared: list[float] = []

    class Spied(KeepLoRA):
        def before_training(self, data: TrainingData) -> None:
            gradients = per_adapter(self, full_weight_gradients(self._loss_of, self.layers, data.augmented()))
            super().before_training(data)
            for (_, adapter), gradient in zip(self.adapters(), gradients, strict=True):
                u, s, v = torch.linalg.svd(gradient.double())
                best = (u[:, :4] * s[:4]) @ v[:4]
                product = adapter.B.double() @ adapter.A.double()
                compared.append(float((product - best).norm() / best.norm()))

    strategy = keeplora(backbone, Spied, weight_threshold=0.0, feature_threshold=0.0)
    walk(strategy, max_epochs=1)
    assert strategy.memory.dims == [0] * 8
    assert len(compared) == 3 * 8
    assert max(compared) < 1e-4


@pytest.mark.parametrize(
    ("settings", "remedy"),
    (
        ({"targets": ("q", "fc1")}, "choose targets among q, k, v and proj"),
        ({"targets": ("q", "fc2")}, "choose targets among q, k, v and proj"),
        ({"targets": ("fc1",), "principal": "output"}, "set principal to input"),
    ),
)
def test_projections_that_do_not_go_together_are_refused(
    backbone: Making, settings: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        keeplora(backbone, **settings)


@pytest.mark.parametrize(
    ("principal", "expected"), (("input", principal_subspace), ("output", principal_output_subspace))
)
def test_the_memory_starts_from_the_principal_directions_of_the_weights(
    backbone: Making, principal: str, expected: Callable[[Tensor, float], Tensor]
) -> None:
    strategy = keeplora(backbone, principal=principal)
    weights = per_adapter(strategy, [layer.weight for layer in strategy.layers])
    strategy.expand(Experience(0, 3, range(2)))
    for index, weight in enumerate(weights):
        basis, directions = strategy.memory.basis(index), expected(weight, 0.3)
        torch.testing.assert_close(basis @ basis.mT, directions @ directions.mT, atol=1e-5, rtol=0)


def test_a_head_starts_from_class_means_at_thirty_times_the_cosine(backbone: Making, walk: Walking) -> None:
    norms: list[Tensor] = []

    class Spied(KeepLoRA):
        def before_training(self, data: TrainingData) -> None:
            super().before_training(data)
            assert isinstance(self.head, GrowingLinear)
            features = torch.cat([self.features(images) for images, _ in data.plain()])
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


def test_a_full_memory_leaves_adapters_idle_and_says_so(backbone: Making, walk: Walking) -> None:
    with pytest.warns(UserWarning, match="dimensions free, fewer than the rank"):
        walked = walk(keeplora(backbone, weight_threshold=1.0), max_epochs=1)
    assert all(update.abs().max() < 1e-6 for learnt in walked.learnt for update in learnt.updates)
    assert walked.result.status == "done"
