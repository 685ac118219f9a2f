from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from cl_bench.contracts.strategy import TrainingData
from cl_bench.data.experience import Experience
from cl_bench.maths.losses import augmented_triplet, local_cross_entropy
from cl_bench.measure.moments import second_moments
from cl_bench.network.backbones import Backbone
from strategies.lora_drs import LoRADRS

Walking = Callable[..., Any]
Making = Callable[..., Backbone]

ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}


def lora_drs(backbone: Making, kind: type[LoRADRS] = LoRADRS, **settings: Any) -> LoRADRS:
    how: dict[str, Any] = {
        "rank": 4,
        "retained": 0.9,
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    }
    return kind(backbone(), **how | settings)


def pairs(strategy: LoRADRS) -> list[tuple[Tensor, Tensor]]:
    return [(one.A.detach().double(), one.B.detach().double()) for _, one in strategy.adapters()]


class Watched(LoRADRS):
    """Notes the space of each later experience, by SciPy, and the factors at both ends of its training."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spaces: list[list[np.ndarray[Any, Any]]] = []
        self.starts: list[Any] = []
        self.ends: list[Any] = []
        self.first: list[Tensor] = [layer.weight.clone() for layer in self.layers]

    def before_training(self, data: TrainingData) -> None:
        if not self.experience.is_first:
            now = [layer.weight.clone() for layer in self.layers]
            for layer, pretrained in zip(self.layers, self.first, strict=True):
                layer.weight.copy_(2 * pretrained - layer.weight)  # W_0 - (W - W_0)
            moments = second_moments(self.features, self.layers, data.augmented())
            for layer, weight in zip(self.layers, now, strict=True):
                layer.weight.copy_(weight)
            self.spaces.append([self._space(moment.numpy()) for moment in moments])
        super().before_training(data)
        self.starts.append(pairs(self))

    def _space(self, moment: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        directions, energies, _ = scipy.linalg.svd(moment)
        shares = np.cumsum(energies) / energies.sum()
        count = int(np.searchsorted(shares, self.retained)) + 1
        found: np.ndarray[Any, Any] = directions[:, :count] @ directions[:, :count].T
        return found

    def after_training(self, data: TrainingData) -> None:
        self.ends.append(pairs(self))
        super().after_training(data)


@pytest.mark.parametrize("settings", ({}, {"normalise": True}, {"rectification": True}))
def test_all_steps_together_stay_inside_the_space_of_the_subtracted_network(
    backbone: Making, walk: Walking, settings: dict[str, Any]
) -> None:
    strategy = lora_drs(backbone, Watched, **settings)
    walk(strategy)
    assert isinstance(strategy, Watched)
    assert len(strategy.spaces) == 2
    for spaces, start, end in zip(strategy.spaces, strategy.starts[1:], strategy.ends[1:], strict=True):
        for projection, ((A, B), (A_end, B_end)) in enumerate(zip(start, end, strict=True)):
            outside = torch.eye(32, dtype=torch.float64) - torch.from_numpy(spaces[projection // 2])
            for change in ((A_end - A).mT, B_end - B):
                assert change.norm() > 1e-4
                assert (outside @ change).norm() < 2e-5 * change.norm()


def test_projecting_the_gradient_before_adam_leaves_the_space(backbone: Making, walk: Walking) -> None:
    """Adam scales each entry by its own history, so what it does to a projected gradient is not projected."""

    class Before(Watched):
        def rectify_gradients(self) -> None:
            super().rectify_gradients()
            if not self.experience.is_first:
                for projection, adapter in self.adapters():
                    assert adapter.A.grad is not None
                    adapter.A.grad.copy_(self.memory.residual(adapter.A.grad.mT, projection).mT)

        def after_step(self) -> None:
            """Leave what the optimizer did."""

    strategy = lora_drs(backbone, Before)
    walk(strategy)
    assert isinstance(strategy, Before)
    for projection, ((A, _), (A_end, _)) in enumerate(
        zip(strategy.starts[-1], strategy.ends[-1], strict=True)
    ):
        outside = torch.eye(32, dtype=torch.float64) - torch.from_numpy(strategy.spaces[-1][projection // 2])
        assert (outside @ (A_end - A).mT).norm() > 1e-2 * (A_end - A).norm()


@pytest.mark.parametrize("normalise", (False, True))
def test_a_step_is_that_of_adam_times_the_projector(backbone: Making, normalise: bool) -> None:
    """Adam is written out here; the normalised projector has the Frobenius norm 1, the other √k."""
    strategy = lora_drs(backbone, normalise=normalise)
    for index in range(2):
        strategy.expand(Experience(index, 2, range(2 * index, 2 * index + 2)))
    generator = torch.Generator().manual_seed(0)
    inside = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q
    for projection in (0, 2):
        strategy.memory.replace(projection, inside[:, 5:])  # five directions are left
    T = inside[:, :5] @ inside[:, :5].mT
    T = T / T.norm() if normalise else T
    assert float(T.norm()) == pytest.approx(1 if normalise else 5**0.5, rel=1e-5)
    optimizer = torch.optim.Adam(strategy.parameters(), lr=0.01, **ADAM)  # type: ignore[arg-type]
    _, adapter = next(strategy.adapters())
    expected = [adapter.A.detach().clone(), adapter.B.detach().clone()]
    first, second = [torch.zeros_like(one) for one in expected], [torch.zeros_like(one) for one in expected]
    for step in range(1, 4):
        for _, one in strategy.adapters():
            one.A.grad = torch.randn(one.A.shape, generator=generator)
            one.B.grad = torch.randn(one.B.shape, generator=generator)
        for place, tensor in enumerate((adapter.A, adapter.B)):
            assert tensor.grad is not None
            first[place] = 0.9 * first[place] + 0.1 * tensor.grad
            second[place] = 0.999 * second[place] + 0.001 * tensor.grad**2
            change = -0.01 * (first[place] / (1 - 0.9**step))
            change = change / ((second[place] / (1 - 0.999**step)).sqrt() + 1e-8)
            expected[place] = expected[place] + (change @ T if place == 0 else T @ change)
        strategy.rectify_gradients()
        optimizer.step()
        with torch.no_grad():
            strategy.after_step()
    torch.testing.assert_close(adapter.A.detach(), expected[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(adapter.B.detach(), expected[1], atol=1e-6, rtol=1e-4)


def test_the_first_experience_trains_as_the_optimizer_does(backbone: Making) -> None:
    strategy = lora_drs(backbone)
    strategy.expand(Experience(0, 2, range(2)))
    _, adapter = next(strategy.adapters())
    strategy.rectify_gradients()
    with torch.no_grad():
        adapter.A.add_(1.0)
        moved = adapter.A.clone()
        strategy.after_step()
    assert torch.equal(adapter.A, moved)


def test_what_was_learnt_is_subtracted_and_comes_back_bit_by_bit(backbone: Making, walk: Walking) -> None:
    strategy = lora_drs(backbone)
    pretrained = [layer.weight.clone() for layer in strategy.layers]
    walk(strategy)
    now = [layer.weight.clone() for layer in strategy.layers]
    with torch.no_grad(), strategy._subtracted():
        for layer, first, last in zip(strategy.layers, pretrained, now, strict=True):
            torch.testing.assert_close(layer.weight, 2 * first - last, atol=1e-6, rtol=0)
            assert not torch.equal(layer.weight, last)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(strategy.layers, now, strict=True))


def test_images_get_the_class_whose_mean_has_the_nearest_angle(backbone: Making, walk: Walking) -> None:
    means: list[Tensor] = []

    class Spied(LoRADRS):
        def after_training(self, data: TrainingData) -> None:
            with torch.no_grad():
                found = [(self.features(images), labels) for images, labels in data.plain()]
            features, labels = (torch.cat(list(one)) for one in zip(*found, strict=True))
            means.extend(features[labels == label].mean(dim=0) for label in self.experience.classes)
            super().after_training(data)

    strategy = lora_drs(backbone, Spied)
    walk(strategy)
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features = strategy.features(images).detach()
    expected = [[float(one @ mean / (one.norm() * mean.norm())) for mean in means] for one in features]
    torch.testing.assert_close(strategy(images).detach(), torch.tensor(expected), atol=1e-5, rtol=0)
    assert len(means) == 6


def test_the_loss_adds_the_triplets_to_old_prototypes(backbone: Making, walk: Walking) -> None:
    strategy = lora_drs(backbone, triplet_weight=0.3, margin=2.0)
    walk(strategy, max_epochs=1)
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(6, 32, generator=generator), torch.tensor([4, 5] * 3)
    entropy = local_cross_entropy(strategy.head(features)[:, 4:], labels, 4)
    old = strategy.prototypes.means[:4]
    unit, fixed = features / features.norm(dim=1, keepdim=True), old / old.norm(dim=1, keepdim=True)
    hinges = []
    for place in range(6):
        own = [float((unit[place] - unit[i]).norm()) for i in range(6) if labels[i] == labels[place]]
        others = [float((unit[place] - unit[i]).norm()) for i in range(6) if labels[i] != labels[place]]
        others += [float((unit[place] - one).norm()) for one in fixed]
        hinges.append(max(max(own) - min(others) + 2, 0))
    expected = entropy + 0.3 * sum(hinges) / 6
    torch.testing.assert_close(strategy.loss(features, labels), expected, atol=1e-5, rtol=1e-5)
    assert min(hinges) > 0  # distances on the unit sphere never exceed the margin of 2
    assert torch.isfinite(augmented_triplet(features, torch.full((6,), 4), old[:0], 1.0))


def test_rectification_plugs_in_before_the_optimizer(backbone: Making, walk: Walking) -> None:
    """At the first step B is zero, so the rectified gradient of A is zero, and that of B is not."""
    first: list[tuple[float, float]] = []

    class Spied(LoRADRS):
        def rectify_gradients(self) -> None:
            super().rectify_gradients()
            for _, adapter in self.adapters():
                if not adapter.B.any():
                    assert adapter.A.grad is not None and adapter.B.grad is not None
                    first.append((float(adapter.A.grad.norm()), float(adapter.B.grad.norm())))

    plain = walk(lora_drs(backbone))
    rectified = walk(lora_drs(backbone, Spied, rectification=True))
    assert len(first) == 3 * 4
    assert all(of_A == 0 and of_B > 0 for of_A, of_B in first)
    assert rectified.losses[0] == plain.losses[0]
    assert rectified.losses[1:] != plain.losses[1:]
    assert lora_drs(backbone, rectification=True).variant == "GR"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    (({"targets": ("k", "fc1")}, "choose targets among"), ({"retained": 0.0}, "above 0")),
)
def test_what_cannot_be_projected_is_refused(
    backbone: Making, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        lora_drs(backbone, **settings)
