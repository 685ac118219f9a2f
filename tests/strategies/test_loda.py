from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor

from cl_bench.contracts.strategy import TrainingData
from cl_bench.data.experience import Batch, Experience
from cl_bench.measure.moments import second_moments
from cl_bench.network.backbones import Backbone
from strategies.loda import LoDA, Recalibration, looking_ahead, recalibration

Walking = Callable[..., Any]
Making = Callable[..., Backbone]


def loda(backbone: Making, kind: type[LoDA] = LoDA, **changes: Any) -> LoDA:
    settings: dict[str, Any] = {
        "rank": 4,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    }
    return kind(backbone(), **settings | changes)


class Measured(LoDA):
    """Keeps the new and the old moments that every experience starts from."""

    def before_training(self, data: TrainingData) -> None:
        found = second_moments(self.features, self.layers, data.augmented())
        self.measured.append((found, self.old_moments.clone()))
        super().before_training(data)

    @cached_property
    def measured(self) -> list[tuple[Tensor, Tensor]]:
        return []


def test_general_rows_are_the_strongest_directions_of_old_and_new_inputs(
    backbone: Making, walk: Walking
) -> None:
    strategy = Measured(backbone(), rank=4)
    walked = walk(strategy, max_epochs=1)
    assert len(strategy.measured) == 3
    for learnt, (new, old) in zip(walked.learnt, strategy.measured, strict=True):
        for general, both in zip(learnt.down[::2], new + old, strict=True):
            directions = torch.linalg.eigh(both)[1][:, -4:]
            projector = 3 * general.double().mT @ general.double()
            torch.testing.assert_close(projector, directions @ directions.mT, atol=1e-5, rtol=0)


def test_isolated_rows_span_what_scipy_finds_for_new_against_old_inputs(
    backbone: Making, walk: Walking
) -> None:
    strategy = Measured(backbone(), rank=4)
    walked = walk(strategy, max_epochs=1)
    for learnt, (new, old) in list(zip(walked.learnt, strategy.measured, strict=True))[1:]:
        for isolated, ours, theirs in zip(learnt.down[1::2], new, old, strict=True):
            raised = theirs + 1e-12 * theirs.diagonal().mean() * torch.eye(32)
            solutions = scipy.linalg.eigh(ours.numpy(), raised.numpy())[1][:, -4:]
            directions = torch.linalg.qr(torch.from_numpy(solutions)).Q
            projector = 3 * isolated.double().mT @ isolated.double()
            torch.testing.assert_close(projector, directions @ directions.mT, atol=1e-4, rtol=0)


def test_only_the_rows_of_the_general_branch_are_trained_and_only_at_first(
    backbone: Making, walk: Walking
) -> None:
    first, *later = walk(loda(backbone)).learnt
    for general, at_end in zip(first.down[::2], first.down_at_end[::2], strict=True):
        assert not torch.equal(general, at_end)
    assert all(map(torch.equal, first.down[1::2], first.down_at_end[1::2]))
    for learnt in later:
        assert all(map(torch.equal, learnt.down, learnt.down_at_end))


def test_finished_experiences_enter_the_old_moments_twice_as_released_or_once(
    backbone: Making, walk: Walking
) -> None:
    traces = {}
    for twice in (True, False):
        strategy = loda(backbone, count_merged=twice)
        walk(strategy, max_epochs=0)
        traces[twice] = strategy.old_moments.diagonal(dim1=1, dim2=2).sum()
    torch.testing.assert_close(traces[True], 2 * traces[False])


def test_without_margin_the_loss_is_a_softmax_of_scaled_cosines(
    backbone: Making,
) -> None:
    strategy = loda(backbone)
    for index in range(2):
        strategy.expand(Experience(index, 2, range(3 * index, 3 * index + 3)))
    features = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 4, 5, 3, 4])
    weights = strategy.head.parts.get_parameter("1.weight")
    cosines = torch.nn.functional.cosine_similarity(features[:, None], weights[None], dim=2)
    expected = torch.nn.functional.cross_entropy(20 * cosines, labels - 3)
    torch.testing.assert_close(strategy.loss(features, labels), expected)


def test_the_first_experience_is_merged_as_trained_and_later_ones_recalibrated(
    backbone: Making, walk: Walking
) -> None:
    checked: list[bool] = []

    class Spied(LoDA):
        def after_training(self, data: TrainingData) -> None:
            new, old = self._moments(data), self.old_moments.clone()
            expected = []
            for layer, of_old, of_new in zip(self.layers, old, new, strict=True):
                general, isolated = layer.adapter("general"), layer.adapter("isolated")
                rows = general.A.double()
                energy_old = torch.einsum("ri,ij,rj->r", rows, of_old, rows)
                energy_new = torch.einsum("ri,ij,rj->r", rows, of_new, rows)
                kept = 1 - energy_old / (energy_old + 3 * energy_new)
                assert bool((kept == 1).all()) is self.experience.is_first
                delta = 0.25 * general.B.double() @ torch.diag(kept) @ rows
                delta += 0.5 * isolated.B.double() @ isolated.A.double()
                expected.append(layer.weight.double() + delta)
            super().after_training(data)
            for layer, weight in zip(self.layers, expected, strict=True):
                torch.testing.assert_close(layer.weight.double(), weight, atol=1e-6, rtol=0)
                assert not layer.adapter("general").B.any() and not layer.adapter("isolated").B.any()
            checked.append(True)

    walk(loda(backbone, Spied))
    assert len(checked) == 3


class Stepping(LoDA):
    """Counts steps, and checks that looking ahead leaves no trace."""

    steps = 0
    drift = 0.0

    def _step(self, batch: Batch, ahead: Batch | None = None, length: float = 0.0) -> Tensor:
        self.steps += 1
        with torch.no_grad():
            before = [adapter.detach().clone() for layer in self.layers for adapter in layer.parameters()]
        if ahead is not None:
            with self._looking_ahead(ahead, self.radius):
                pass
        after = [adapter.detach() for layer in self.layers for adapter in layer.parameters()]
        self.drift += sum(float((one - other).abs().max()) for one, other in zip(before, after, strict=True))
        return super()._step(batch, ahead, length)


def test_every_batch_takes_two_steps_and_looking_ahead_leaves_no_trace(
    backbone: Making, walk: Walking
) -> None:
    strategy = loda(backbone, Stepping)
    walk(strategy, max_epochs=1, batch_size=24)
    assert isinstance(strategy, Stepping)
    assert strategy.steps == 2 * 3
    assert strategy.drift == 0


def test_a_step_takes_its_gradient_where_a_step_on_the_other_half_leads(
    backbone: Making, walk: Walking
) -> None:
    """By hand, for plain SGD: the gradient there, the step from here, heads never moved ahead."""
    checked: list[bool] = []

    class Spied(LoDA):
        def _step(self, batch: Batch, ahead: Batch | None = None, length: float = 0.0) -> Tensor:
            if ahead is None:
                return super()._step(batch, ahead, length)
            trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
            here = {name: p.detach().clone() for name, p in trained.items()}
            tensors = list(trained.values())
            ahead_of = torch.autograd.grad(self.batch_loss(ahead), tensors)
            gradients = dict(zip(trained, ahead_of, strict=True))
            for name, parameter in trained.items():
                if "adapters" in name:
                    norm = gradients[name].norm() + 1e-12
                    parameter.data.sub_(length * gradients[name] / norm)
            there = torch.autograd.grad(self.batch_loss(batch), tensors)
            for name, parameter in trained.items():
                parameter.data.copy_(here[name])
            loss = super()._step(batch, ahead, length)
            for (name, parameter), gradient in zip(trained.items(), there, strict=True):
                torch.testing.assert_close(parameter.detach(), here[name] - 0.05 * gradient)
            checked.append(True)
            return loss

    walk(loda(backbone, Spied, optimizer=lambda p: torch.optim.SGD(p, lr=0.05)), max_epochs=1)
    assert len(checked) >= 6


def test_a_radius_of_zero_is_two_plain_steps_on_the_halves(backbone: Making, walk: Walking) -> None:
    class Plain(LoDA):
        def _step(self, batch: Batch, ahead: Batch | None = None, length: float = 0.0) -> Tensor:
            return super()._step(batch)

    assert walk(loda(backbone, radius=0.0)).losses == walk(loda(backbone, Plain)).losses
    assert walk(loda(backbone, radius=3.0)).losses != walk(loda(backbone, Plain)).losses


def test_looking_ahead_goes_down_the_gradient_of_the_other_half(backbone: Making, walk: Walking) -> None:
    differences: list[float] = []

    class Spied(LoDA):
        def _step(self, batch: Batch, ahead: Batch | None = None, length: float = 0.0) -> Tensor:
            if ahead is not None:
                with torch.no_grad():
                    here = self.loss(self.features(ahead[0]), ahead[1])
                with self._looking_ahead(ahead, 1e-2), torch.no_grad():
                    there = self.loss(self.features(ahead[0]), ahead[1])
                if here > 0.1:  # below that, the rest of the loss is rounding
                    differences.append(float(there - here))
            return super()._step(batch, ahead, length)

    walk(loda(backbone, Spied), max_epochs=1)
    assert differences and max(differences) < 0


def test_a_schedule_is_stepped_once_an_epoch(backbone: Making, walk: Walking) -> None:
    rates: list[float] = []

    class Spied(LoDA):
        def on_train_epoch_start(self) -> None:
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)
            rates.append(optimizer.param_groups[0]["lr"])

    for alignment in (True, False):
        rates.clear()
        walk(
            loda(
                backbone,
                Spied,
                gradient_alignment=alignment,
                scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
            ),
            max_epochs=2,
        )
        assert rates == [0.05, 0.025] * 3


# Halves of a batch, and looking ahead


@pytest.mark.parametrize("classes", (2, 5, 8))
def test_halves_share_no_class_and_hold_every_image(backbone: Making, classes: int) -> None:
    labels = torch.arange(24) % classes
    torch.manual_seed(0)
    halves = loda(backbone).class_halves((torch.arange(24), labels))
    assert halves is not None
    (first, of_first), (second, of_second) = halves
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(24))
    assert torch.equal(labels[first], of_first) and torch.equal(labels[second], of_second)
    assert len(of_first.unique()) == classes // 2
    assert not set(of_first.tolist()) & set(of_second.tolist())


def test_halves_change_from_draw_to_draw(backbone: Making) -> None:
    strategy, labels = loda(backbone), torch.arange(8)
    drawn = [strategy.class_halves((labels, labels)) for _ in range(10)]
    assert len({tuple(halves[0][1].tolist()) for halves in drawn if halves}) > 3


def test_a_single_class_has_no_halves(backbone: Making) -> None:
    assert loda(backbone).class_halves((torch.arange(3), torch.tensor([4, 4, 4]))) is None


def test_tensors_come_back_bit_for_bit_even_after_an_error() -> None:
    weight = torch.randn(5, generator=torch.Generator().manual_seed(0)) / 3
    before = weight.clone()
    with pytest.raises(RuntimeError), looking_ahead([weight], [torch.ones(5)], 0.7):
        assert (weight - before).norm() == pytest.approx(0.7, rel=1e-5)
        raise RuntimeError
    assert torch.equal(weight, before)


def test_a_gradient_of_zero_moves_nothing() -> None:
    weight = torch.ones(3)
    with looking_ahead([weight], [torch.zeros(3)], 0.7):
        assert torch.equal(weight, torch.ones(3))


# Recalibration

EYE = torch.eye(4, dtype=torch.float64)
GAMMA = 3.0


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(seed: int) -> Tensor:
    inputs = normal(50, 32, seed=seed)
    return inputs.mT @ inputs / 50


OLD, NEW = moments(0), moments(1)
UP, DOWN = normal(96, 4, seed=2), normal(4, 32, seed=3)


def objective(scaling: Tensor) -> Tensor:
    """Return how the product acts on old inputs, plus what new inputs miss of it, weighted."""

    def energy(product: Tensor, second_moment: Tensor) -> Tensor:
        return (product @ second_moment @ product.mT).trace()

    return energy(UP @ scaling @ DOWN, OLD) + GAMMA * energy(UP @ (scaling - EYE) @ DOWN, NEW)


def test_the_full_form_is_the_optimum_whatever_b() -> None:
    scaling = recalibration(DOWN, OLD, NEW, GAMMA, "full").requires_grad_()
    loss = objective(scaling)
    (gradient,) = torch.autograd.grad(loss, scaling)
    assert gradient.abs().max() < 1e-9 * loss.item()


def test_the_diagonal_form_lies_between_the_optimum_and_none() -> None:
    kinds: tuple[Recalibration, ...] = ("full", "diag", "none")
    values = [float(objective(recalibration(DOWN, OLD, NEW, GAMMA, kind))) for kind in kinds]
    assert values == sorted(values)
    entries = recalibration(DOWN, OLD, NEW, GAMMA, "diag").diagonal()
    assert bool(((entries >= 0) & (entries <= 1)).all())


@pytest.mark.parametrize("kind", ("diag", "full"))
def test_only_new_inputs_keep_the_product_and_only_old_ones_remove_it(kind: Recalibration) -> None:
    torch.testing.assert_close(recalibration(DOWN, OLD, NEW, 1e9, kind), EYE, atol=1e-6, rtol=0)
    torch.testing.assert_close(recalibration(DOWN, OLD, NEW, 1e-9, kind), 0 * EYE, atol=1e-6, rtol=0)
    torch.testing.assert_close(recalibration(DOWN, 0 * OLD, NEW, GAMMA, kind), EYE, atol=1e-9, rtol=0)
