from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_bench.measure.gradients import full_weight_gradients
from cl_bench.measure.means import ClassMeans, class_means
from cl_bench.measure.moments import SecondMoments, second_moments
from cl_bench.measure.passes import measure

Making = Callable[..., Any]


def test_one_pass_serves_every_statistic(adapted: Making, batches: Making) -> None:
    backbone, layers = adapted()
    passes = 0

    def features(images: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return backbone(images)  # type: ignore[no-any-return]

    means, moments = ClassMeans(range(3)), SecondMoments(layers)
    measure(features, batches(5), means, moments)
    assert passes == 3
    assert torch.equal(means.mean(), class_means(backbone, batches(5), range(3)))
    assert torch.equal(moments.mean(), second_moments(backbone, layers, batches(5)))


def test_a_pass_that_needs_only_inputs_stops_at_the_last_of_them(adapted: Making, batches: Making) -> None:
    backbone, layers = adapted()
    reached: list[str] = []
    for name, place in (("first", 0), ("last", 1)):
        layer = backbone.vit.get_submodule(f"blocks.{place}.attn.qkv")
        layer.register_forward_hook(lambda *_, name=name: reached.append(name))
    whole = SecondMoments(layers)
    with whole.recording():
        for images, _ in batches(5):
            backbone(images)
    assert reached == ["first", "last"] * 3
    reached.clear()
    assert torch.equal(second_moments(backbone, layers, batches(5)), whole.mean())
    assert reached == ["first", "last", "first", "first"]
    reached.clear()
    one, other = SecondMoments(layers[1:]), SecondMoments(layers[:1])
    measure(backbone, batches(5), one, other)
    assert torch.equal(torch.cat([other.mean(), one.mean()]), whole.mean())
    assert reached == ["first", "last", "first", "first"]


class Counting(SecondMoments):
    images = 0

    def add(self, features: Tensor, labels: Tensor) -> None:
        self.images += len(features)


def test_a_pass_is_complete_for_features_and_for_layers_that_are_called_again(
    adapted: Making, batches: Making
) -> None:
    backbone, layers = adapted()
    both = Counting(layers)
    measure(backbone, batches(5), both)
    assert both.images == 12
    layer = nn.Linear(2, 2, bias=False)
    moments = SecondMoments([layer])
    ones = [(torch.ones(1, 2), torch.zeros(1))] * 3
    measure(lambda images: layer(images) + layer(2 * images), ones, moments)
    assert moments.tokens.tolist() == [6]
    assert torch.equal(moments.mean()[0], torch.full((2, 2), 2.5, dtype=torch.float64))


def test_no_layer_is_recorded_after_a_pass_even_if_it_fails(adapted: Making, batches: Making) -> None:
    backbone, layers = adapted()
    measure(backbone, batches(6), SecondMoments(layers))
    assert not any(layer._forward_pre_hooks for layer in layers)
    with pytest.raises(ValueError, match="do not fit"):
        measure(backbone, [(torch.zeros(1, 3, 4, 4), torch.zeros(1))], SecondMoments(layers))
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_every_second_pass_is_recorded_the_first_included() -> None:
    layer = nn.Linear(1, 1)
    moments = SecondMoments([layer], every=2)
    with moments.recording():
        for value in (1.0, 2.0, 3.0, 4.0, 5.0):
            layer(torch.tensor([[value]]))
    assert moments.tokens.tolist() == [3]
    assert moments.mean().item() == pytest.approx((1 + 9 + 25) / 3)


def test_the_layers_that_a_statistic_records_are_not_part_of_its_state() -> None:
    assert set(SecondMoments([nn.Linear(3, 1)]).state_dict()) == {"sums", "tokens", "_extra_state"}


def test_layers_of_two_widths_are_refused() -> None:
    with pytest.raises(
        ValueError, match="Layers of 3 and 4 inputs cannot share a statistic: give layers of one width"
    ):
        SecondMoments([nn.Linear(4, 1), nn.Linear(3, 1)])


def test_processes_that_share_the_images_measure_what_a_single_one_would(
    monkeypatch: pytest.MonkeyPatch, adapted: Making, batches: Making, loss_of: Making
) -> None:
    def measured(part: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        backbone, layers = adapted()
        means, moments = ClassMeans(range(3)), SecondMoments(layers)
        measure(backbone, part, means, moments)
        return [means.mean(), moments.mean(), *full_weight_gradients(loss_of(backbone), layers, part)]

    (everything, labels), *_ = batches(12)
    unequal = [[(everything[:4], labels[:4])], [(everything[4:], labels[4:])]]
    sent: list[Tensor] = []
    expected = measured(batches(12))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sent.append(sums.clone()))
    measured(unequal[0])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.add_(sent.pop(0)))
    found = measured(unequal[1])
    assert not sent
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 if one.dtype == torch.float32 else 1e-10)
