from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from cl_bench.contracts.strategy import TrainingData
from cl_bench.data.experience import Batch
from cl_bench.maths.violation import relative_violation
from cl_bench.measure.gradients import full_weight_gradients
from cl_bench.measure.means import class_means
from cl_bench.network.backbones import Backbone
from strategies.janus_lora import JanusLoRA
from strategies.lora import LoRA

Walking = Callable[..., Any]
Making = Callable[..., Backbone]

OFF: dict[str, Any] = {"online_estimation": None, "rectification": False, "decoupled_margin": False}
ADAM = lambda parameters: torch.optim.Adam(parameters, lr=0.01)  # noqa: E731
SGD = lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9)  # noqa: E731


def janus(backbone: Making, **changes: Any) -> JanusLoRA:
    settings: dict[str, Any] = {"rank": 4, "optimizer": ADAM, "threshold": 0.8, "threshold_end": 0.9}
    return JanusLoRA(backbone(), **settings | changes)


def violations(walked: Any) -> list[float]:
    """Return the relative violation of every key and value update after the first experience."""
    found = []
    for learnt in walked.learnt[1:]:
        for update, basis in zip(learnt.updates, learnt.bases, strict=True):
            assert basis.shape[1] > 0
            found.append(float(relative_violation(update, basis.double())))
    return found


def test_with_every_part_off_it_is_plain_lora_bit_for_bit(backbone: Making, walk: Walking) -> None:
    settings: dict[str, Any] = {"rank": 4, "optimizer": ADAM}
    plain, off = LoRA(backbone(), **settings), JanusLoRA(backbone(), **settings, **OFF)
    one, other = walk(plain), walk(off)
    assert one.losses == other.losses
    assert one.result.rows == other.result.rows
    ours = off.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in plain.state_dict().items())


def test_only_rectification_acts_in_the_first_experience(backbone: Making, walk: Walking) -> None:
    """Nothing is protected and no prototype is kept yet."""
    first = walk(janus(backbone, **OFF)).losses[:6]
    for part in ({"online_estimation": "exact"}, {"online_estimation": "stream"}, {"decoupled_margin": True}):
        assert walk(janus(backbone, **OFF | part)).losses[:6] == first
    assert walk(janus(backbone, **OFF | {"rectification": True})).losses[:6] != first


@pytest.mark.parametrize("optimizer", (ADAM, SGD), ids=("Adam", "SGD"))
@pytest.mark.parametrize("rectification", (True, False))
def test_safe_rows_leave_what_older_inputs_use_untouched_under_any_optimizer(
    backbone: Making, walk: Walking, optimizer: Any, rectification: bool
) -> None:
    walked = walk(janus(backbone, rectification=rectification, row_space="safe", optimizer=optimizer))
    assert max(violations(walked)) < 1e-5


def test_free_rows_under_adam_act_on_what_older_inputs_use(backbone: Making, walk: Walking) -> None:
    walked = walk(janus(backbone, row_space="free"))
    assert min(violations(walked)) > 1e-2


def test_free_rows_under_sgd_act_less_on_it_with_rectification_than_without(
    backbone: Making, walk: Walking
) -> None:
    with_, without = (
        violations(
            walk(
                janus(
                    backbone,
                    row_space="free",
                    rectification=on,
                    # Rectified steps are those of the whole weight, which are larger than those of factors.
                    optimizer=lambda p, lr=lr: torch.optim.SGD(p, lr=lr),
                )
            )
        )
        for on, lr in ((True, 0.01), (False, 0.1))
    )
    assert sum(with_) < sum(without)


def test_what_is_measured_in_training_is_what_is_protected(backbone: Making, walk: Walking) -> None:
    """New directions join the old ones, at right angles, until the energy that training saw is held."""
    seen: list[torch.Tensor] = []

    class Spied(JanusLoRA):
        def protect(self, moments: torch.Tensor, most: int | None = None) -> None:
            seen.append(moments[self.layer_of])
            super().protect(moments, most)

    strategy = Spied(backbone(), rank=4, optimizer=ADAM, threshold=0.8, threshold_end=0.8)
    walked = walk(strategy, max_epochs=1)
    assert len(seen) == 3
    for earlier, later, moments in zip(walked.learnt, walked.learnt[1:], seen, strict=False):
        for old, new, moment in zip(earlier.bases, later.bases, moments, strict=True):
            assert torch.equal(new[:, : old.shape[1]], old)
            grown = new[:, old.shape[1] :]
            torch.testing.assert_close(old.mT @ grown, torch.zeros(old.shape[1], grown.shape[1]))
            held = (new.mT @ moment.float() @ new).trace() / moment.trace()
            assert held >= 0.8 - 1e-6


def test_online_estimation_records_every_token_of_training_and_no_other(
    backbone: Making, walk: Walking
) -> None:
    tokens: list[int] = []

    class Spied(JanusLoRA):
        def protect(self, moments: torch.Tensor, most: int | None = None) -> None:
            assert self.inputs is not None
            tokens.append(int(self.inputs.tokens[0]))
            super().protect(moments, most)

    walk(Spied(backbone(), rank=4, optimizer=ADAM), max_epochs=2)
    assert tokens == [2 * 2 * 12 * 17] * 3  # epochs, classes, images of each, patches and the class token


def test_a_stream_of_sketches_protects_nearly_the_same(backbone: Making, walk: Walking) -> None:
    exact, sketched = janus(backbone), janus(backbone, online_estimation="stream", sketch_rows=24)
    walk(exact), walk(sketched)
    for projection in range(4):
        one, other = exact.memory.basis(projection), sketched.memory.basis(projection)
        assert abs(one.shape[1] - other.shape[1]) <= 3
        shared = (one.mT @ other).square().sum() / min(one.shape[1], other.shape[1])
        assert shared > 0.9


def test_a_sketch_adds_no_more_directions_than_it_has_rows_and_warns(backbone: Making, walk: Walking) -> None:
    strategy = janus(backbone, online_estimation="stream", sketch_rows=3)
    with pytest.warns(UserWarning, match="and only 3 are known"):
        learnt = walk(strategy, max_epochs=1).learnt
    widths = [[basis.shape[1] for basis in one.bases] for one in learnt] + [strategy.memory.dims]
    assert all(0 <= b - a <= 3 for one, other in pairwise(widths) for a, b in zip(one, other, strict=True))
    assert min(widths[-1]) > 0


def test_sums_of_an_experience_are_freed_at_its_end(backbone: Making, walk: Walking) -> None:
    strategy = janus(backbone)
    walk(strategy)
    assert strategy.inputs is not None
    assert not strategy.inputs.tokens.any()
    assert strategy.state_dict()["inputs.sums"].numel() == 0


def test_prototypes_are_the_mean_features_of_the_merged_model_on_plain_images(
    backbone: Making, walk: Walking
) -> None:
    means: list[torch.Tensor] = []

    class Spied(JanusLoRA):
        def after_training(self, data: TrainingData) -> None:
            super().after_training(data)
            means.append(class_means(self.features, data.plain(), self.experience.classes))

    strategy = Spied(backbone(), rank=4, optimizer=ADAM, threshold=0.8, threshold_end=0.9)
    walk(strategy)
    torch.testing.assert_close(strategy.prototypes.means, torch.cat(means))


def test_without_the_margin_no_prototype_is_kept(backbone: Making, walk: Walking) -> None:
    strategy = janus(backbone, decoupled_margin=False)
    walk(strategy, max_epochs=1)
    assert not strategy.prototypes.means.numel()


@pytest.mark.parametrize("row_space", ("safe", "free"))
@pytest.mark.parametrize("gauge", ("half", "a-first"))
def test_steps_use_the_closed_form_of_the_projected_gradient_of_the_whole_weight(
    backbone: Making, walk: Walking, row_space: Any, gauge: Any
) -> None:
    """Against pseudo-inverses of the full gradient, which the strategy never forms."""
    compared: list[float] = []

    class Spied(JanusLoRA):
        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            self.batch = batch
            return super().training_step(batch, batch_idx)

        def rectify_gradients(self) -> None:
            whole = full_weight_gradients(
                lambda images, labels: self.loss(self.features(images), labels), self.layers, [self.batch]
            )
            super().rectify_gradients()
            if self.experience.is_first:
                return
            for (projection, adapter), gradient in zip(
                self.adapters(), self.of_projections(whole), strict=True
            ):
                A, B = adapter.A.detach().double(), adapter.B.detach().double()
                safe = self.memory.right_residual(gradient.double(), projection)
                of_B, of_A = (
                    gram + (1e-2 * gram.trace() / len(A) or 1) * torch.eye(len(A))
                    for gram in (B.mT @ B, A @ A.mT)
                )
                by_A = torch.linalg.solve(of_B, B.mT @ safe) / 0.5
                by_B = torch.linalg.solve(of_A, A @ safe.mT).mT / 0.5
                overlap = torch.linalg.solve(of_B, B.mT @ by_B)
                to_B = overlap / 2 if gauge == "half" else 0 * overlap
                for found, expected in (
                    (adapter.A.grad, by_A - to_B @ A),
                    (adapter.B.grad, by_B - B @ (overlap - to_B)),
                ):
                    assert found is not None
                    size = expected.norm().clamp(min=1e-6)
                    compared.append(float((found.double() - expected).norm() / size))

    settings: dict[str, Any] = {"row_space": row_space, "gauge": gauge, "scale": 0.5}
    settings |= {"relative_damping": 1e-2}
    strategy = Spied(backbone(), rank=4, optimizer=ADAM, threshold=0.8, threshold_end=0.9, **settings)
    walk(strategy, max_epochs=1)
    assert len(compared) > 20
    assert max(compared) < 1e-3


def test_the_margin_pushes_new_features_away_from_old_prototypes(backbone: Making, walk: Walking) -> None:
    strategy = janus(backbone, margin_weight=1.0)
    walk(strategy)
    old = strategy.prototypes.means[:4]
    features = (
        old[:2] + 0.1 * torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    ).requires_grad_()
    labels = torch.tensor([4, 5])
    with_margin = strategy.loss(features, labels)
    strategy.decoupled_margin = False
    assert with_margin > strategy.loss(features, labels)


@pytest.mark.parametrize(
    ("settings", "variant"),
    (
        ({}, None),
        (OFF, "all parts off"),
        ({"decoupled_margin": False}, "OE + GR"),
        ({"online_estimation": None}, "GR + DML"),
    ),
)
def test_the_variant_names_the_parts_that_are_on(
    backbone: Making, settings: dict[str, Any], variant: str | None
) -> None:
    assert janus(backbone, **settings).variant == variant


def test_a_sketch_with_the_energy_of_the_covariance_is_refused(backbone: Making) -> None:
    with pytest.raises(ValueError, match="set energy to features"):
        janus(backbone, online_estimation="stream", energy="covariance")


def test_fewer_free_dimensions_than_the_rank_are_a_warning(backbone: Making, walk: Walking) -> None:
    with pytest.warns(UserWarning, match="fewer than the rank 4"):
        walk(janus(backbone, threshold=1.0, threshold_end=1.0), max_epochs=1, images_per_class=4)


def test_the_memory_is_a_part_of_the_state(backbone: Making, walk: Walking) -> None:
    strategy = janus(backbone)
    walk(strategy)
    state = {name: tensor for name, tensor in strategy.state_dict().items() if name.startswith("memory.")}
    assert list(state) == ["memory.basis_0", "memory.basis_1"]  # one for each layer
    assert [basis.shape[1] for basis in state.values()] == strategy.memory.dims[::2]
