from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cl_bench.network.adapters import AdaptedLinear, inject
from cl_bench.network.backbones import Backbone
from cl_bench.network.frozen import FrozenConv2d, FrozenLinear, freeze_layers, refresh


class Casts(TorchDispatchMode):
    """Remembers the shapes of all tensors that are rounded to bfloat16."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and found.dtype == torch.bfloat16:
            self.shapes.append(found.shape)
        return found


def half() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture
def backbone(tiny_backbone: Callable[..., Backbone]) -> Backbone:
    return tiny_backbone()


@pytest.mark.parametrize(
    ("layer", "frozen", "x"),
    [
        (nn.Linear(6, 4), FrozenLinear, torch.randn(5, 3, 6)),
        (nn.Linear(6, 4, bias=False), FrozenLinear, torch.randn(5, 6)),
        (nn.Conv2d(3, 4, 2, stride=2), FrozenConv2d, torch.randn(2, 3, 8, 8)),
    ],
)
def test_a_frozen_layer_computes_the_bits_of_the_layer_in_both_precisions(
    layer: Any, frozen: Callable[[Any], nn.Module], x: Tensor
) -> None:
    own = frozen(layer)
    assert torch.equal(own(x), layer(x))
    with half():
        refresh(own)
        assert torch.equal(own(x), layer(x))
        assert own(x).dtype == torch.bfloat16
    assert torch.equal(own(x), layer(x))
    assert own.state_dict().keys() == layer.state_dict().keys()
    assert not any(parameter.requires_grad for parameter in own.parameters())


def test_no_weight_is_rounded_twice(backbone: Backbone, images: Tensor) -> None:
    inject(backbone, ("k", "v"), rank=2)
    with half(), Casts() as first:
        backbone(images).sum().backward()
    with half(), Casts() as second:
        backbone(images).sum().backward()
    weights = {layer.weight.shape for layer in backbone.modules() if hasattr(layer, "in_precision")}
    assert weights <= set(first.shapes)
    assert weights.isdisjoint(second.shapes)


def test_a_merge_reaches_the_next_forward_pass(backbone: Backbone, images: Tensor) -> None:
    layers = inject(backbone, ("k", "v"), rank=2)
    for layer in layers:
        nn.init.normal_(layer.adapter("v").B, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), half():
        trained = backbone(images)
        for layer in layers:
            layer.merge()
        merged = backbone(images)
        for layer in layers:
            layer.weight.zero_()
        assert not torch.equal(backbone(images), merged)
    assert (merged - trained).norm() < 0.05 * trained.norm()


def test_merging_keeps_the_copy_one_object(backbone: Backbone, images: Tensor) -> None:
    layer = inject(backbone, ["v"], rank=2)[0]
    with half():
        backbone(images)
        before, _ = layer.in_precision()
        layer.merge()
        backbone(images)
        after, _ = layer.in_precision()
    assert after is before


def test_copies_made_in_inference_mode_serve_training(backbone: Backbone, images: Tensor) -> None:
    layer = inject(backbone, ["v"], rank=2)[0]
    with torch.inference_mode(), half():
        backbone(images)
    with half():
        backbone(images).sum().backward()
    assert layer.adapter("v").B.grad is not None


def test_the_saved_weight_has_full_precision(backbone: Backbone, images: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with half():
        backbone(images)
    after = backbone.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_weight_that_requires_a_gradient_is_used_itself() -> None:
    layer = FrozenLinear(nn.Linear(3, 2))
    with half():
        refresh(layer)
        layer.weight.requires_grad_(True)
        layer(torch.ones(1, 3)).sum().backward()
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, torch.ones(2, 3))


def test_layers_of_a_subclass_are_not_replaced() -> None:
    model = nn.Sequential(AdaptedLinear(nn.Linear(3, 2), {"v": slice(0, 2)}, rank=1), nn.Linear(2, 2))
    adapted = model[0]
    freeze_layers(model)
    assert model[0] is adapted and type(model[1]) is FrozenLinear


def test_copies_made_while_a_weight_is_trained_require_no_gradient(
    backbone: Backbone, images: Tensor
) -> None:
    layer = inject(backbone, ("k", "v"), rank=2)[0]
    layer.weight.requires_grad_(True)
    with half():
        backbone(images).sum().backward()
        layer.weight.requires_grad_(False)
        copied, _ = layer.in_precision()
    assert copied.dtype == torch.bfloat16
    assert not copied.requires_grad


def test_a_merge_reaches_a_layer_that_is_called_on_its_own(backbone: Backbone, images: Tensor) -> None:
    layer = inject(backbone, ("k",), rank=2)[0]
    with half(), torch.no_grad():
        backbone(images)
        layer.adapter("k").B.copy_(torch.ones_like(layer.adapter("k").B))
        tokens = torch.ones(1, 32)
        before = layer(tokens)
        layer.merge()
        assert torch.allclose(layer(tokens), before, atol=0.02)
        assert (before - torch.nn.functional.linear(tokens, layer.weight)).abs().max() < 0.1


def test_a_bias_that_requires_a_gradient_gets_it(backbone: Backbone, images: Tensor) -> None:
    layer = inject(backbone, ("k", "v"), rank=2)[0]
    assert layer.bias is not None
    layer.bias.requires_grad_(True)
    layer(torch.ones(5, 32)).sum().backward()
    assert layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, torch.full((96,), 5.0))
