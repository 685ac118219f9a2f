from __future__ import annotations

from collections.abc import Callable
from typing import Any

import scipy.linalg
import torch
from torch import Tensor

from cl_bench.contracts.strategy import Batch, TrainingData
from cl_bench.data.experience import Experience
from cl_bench.network.backbones import Backbone
from strategies.loda import LoDA

Walking = Callable[..., Any]
Making = Callable[..., Backbone]


def loda(backbone: Making, kind: type[LoDA] = LoDA, **changes: Any) -> LoDA:
    settings: dict[str, Any] = {
        "rank": 4,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    }
    return kind(backbone(), **settings | changes)


def moments_of(walked_with: Making, walk: Walking) -> tuple[Any, list[Tensor], list[Tensor]]:
    """Return a walk, and for each experience the new and the old moments that it started from."""
    new: list[Tensor] = []
    old: list[Tensor] = []

    class Spied(LoDA):
        def _moments(self, data: Any) -> Tensor:
            if len(new) == len(old):
                old.append(self.old_moments.clone())
            found = super()._moments(data)
            if len(new) < len(old):
                new.append(found)
            return found

        def after_training(self, data: TrainingData) -> None:
            new.append(torch.empty(0))  # what is measured at the end counts as neither
            super().after_training(data)
            new.pop()

    return walk(loda(walked_with, Spied), max_epochs=1), new, old


def test_general_rows_are_the_strongest_directions_of_old_and_new_inputs(
    backbone: Making, walk: Walking
) -> None:
    walked, new, old = moments_of(backbone, walk)
    assert len(new) == len(old) == 3
    for learnt, of_new, of_old in zip(walked.learnt, new, old, strict=True):
        for down, both in zip(learnt.down, of_new + of_old, strict=True):
            directions = torch.linalg.eigh(both)[1][:, -4:]
            projector = 3 * down["general"].double().mT @ down["general"].double()
            torch.testing.assert_close(projector, directions @ directions.mT, atol=1e-5, rtol=0)


def test_isolated_rows_span_what_scipy_finds_for_new_against_old_inputs(
    backbone: Making, walk: Walking
) -> None:
    walked, new, old = moments_of(backbone, walk)
    for learnt, of_new, of_old in list(zip(walked.learnt, new, old, strict=True))[1:]:
        for down, ours, theirs in zip(learnt.down, of_new, of_old, strict=True):
            raised = theirs + 1e-12 * theirs.diagonal().mean() * torch.eye(32)
            solutions = scipy.linalg.eigh(ours.numpy(), raised.numpy())[1][:, -4:]
            directions = torch.linalg.qr(torch.from_numpy(solutions)).Q
            projector = 3 * down["isolated"].double().mT @ down["isolated"].double()
            torch.testing.assert_close(projector, directions @ directions.mT, atol=1e-4, rtol=0)


def test_rows_are_trained_in_the_first_experience_alone_and_only_in_the_general_branch(
    backbone: Making, walk: Walking
) -> None:
    first, *later = walk(loda(backbone)).learnt
    assert not torch.equal(first.down[0]["general"], first.down_at_end[0]["general"])
    assert torch.equal(first.down[0]["isolated"], first.down_at_end[0]["isolated"])
    for learnt in later:
        for down, at_end in zip(learnt.down, learnt.down_at_end, strict=True):
            assert all(torch.equal(down[name], at_end[name]) for name in down)


def test_finished_experiences_enter_the_old_moments_twice_as_released_or_once(
    backbone: Making, walk: Walking
) -> None:
    traces = {}
    for twice in (True, False):
        strategy = loda(backbone, count_merged=twice)
        walk(strategy, max_epochs=0)
        traces[twice] = strategy.old_moments.diagonal(dim1=1, dim2=2).sum()
    torch.testing.assert_close(traces[True], 2 * traces[False])


def test_without_margin_the_loss_is_a_softmax_of_scaled_cosines_to_the_current_classes(
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


def test_the_first_experience_is_merged_as_trained_and_later_ones_as_recalibrated(
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

    def _step(self, batch: Batch, ahead: Batch | None = None, share: float = 0.0) -> Tensor:
        self.steps += 1
        with torch.no_grad():
            before = [adapter.detach().clone() for layer in self.layers for adapter in layer.parameters()]
        if ahead is not None:
            with self._looking_ahead(ahead, self.radius):
                pass
        after = [adapter.detach() for layer in self.layers for adapter in layer.parameters()]
        self.drift += sum(float((one - other).abs().max()) for one, other in zip(before, after, strict=True))
        return super()._step(batch, ahead, share)


def test_every_batch_of_two_classes_takes_two_steps_and_looking_ahead_leaves_no_trace(
    backbone: Making, walk: Walking
) -> None:
    strategy = loda(backbone, Stepping)
    walk(strategy, max_epochs=1, batch_size=24)
    assert isinstance(strategy, Stepping)
    assert strategy.steps == 2 * 3
    assert strategy.drift == 0


def test_a_step_takes_the_gradient_where_a_step_on_the_other_half_would_lead(
    backbone: Making, walk: Walking
) -> None:
    """By hand, for plain SGD: the gradient there, the step from here, heads never moved ahead."""
    checked: list[bool] = []

    class Spied(LoDA):
        def _step(self, batch: Batch, ahead: Batch | None = None, share: float = 0.0) -> Tensor:
            if ahead is None:
                return super()._step(batch, ahead, share)
            trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
            here = {name: p.detach().clone() for name, p in trained.items()}
            tensors = list(trained.values())
            ahead_of = torch.autograd.grad(self._loss_of(ahead), tensors)
            gradients = dict(zip(trained, ahead_of, strict=True))
            for name, parameter in trained.items():
                if "adapters" in name:
                    norm = gradients[name].norm() + 1e-12
                    parameter.data.sub_(share * self.radius * gradients[name] / norm)
            there = torch.autograd.grad(self._loss_of(batch), tensors)
            for name, parameter in trained.items():
                parameter.data.copy_(here[name])
            loss = super()._step(batch, ahead, share)
            for (name, parameter), gradient in zip(trained.items(), there, strict=True):
                torch.testing.assert_close(parameter.detach(), here[name] - 0.05 * gradient)
            checked.append(True)
            return loss

    walk(loda(backbone, Spied, optimizer=lambda p: torch.optim.SGD(p, lr=0.05)), max_epochs=1)
    assert len(checked) >= 6


def test_a_radius_of_zero_is_two_plain_steps_on_the_halves(backbone: Making, walk: Walking) -> None:
    class Plain(LoDA):
        def _step(self, batch: Batch, ahead: Batch | None = None, share: float = 0.0) -> Tensor:
            return super()._step(batch)

    assert walk(loda(backbone, radius=0.0)).losses == walk(loda(backbone, Plain)).losses
    assert walk(loda(backbone, radius=3.0)).losses != walk(loda(backbone, Plain)).losses


def test_looking_ahead_goes_down_the_gradient_of_the_other_half(backbone: Making, walk: Walking) -> None:
    differences: list[float] = []

    class Spied(LoDA):
        def _step(self, batch: Batch, ahead: Batch | None = None, share: float = 0.0) -> Tensor:
            if ahead is not None:
                with torch.no_grad():
                    here = self.loss(self.features(ahead[0]), ahead[1])
                with self._looking_ahead(ahead, 1e-2), torch.no_grad():
                    there = self.loss(self.features(ahead[0]), ahead[1])
                if here > 0.1:  # of what is learnt already, nothing but rounding is left
                    differences.append(float(there - here))
            return super()._step(batch, ahead, share)

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
