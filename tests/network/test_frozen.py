from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cl_bench.network.adapters import AdaptedLinear, inject
from cl_bench.network.backbones import Backbone
from cl_bench.network.frozen import FrozenConv2d, FrozenLinear, freeze_layers, refresh

TINY = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


class Casts(TorchDispatchMode):
    """Remembers the shapes of what is turned into half precision."""

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
def backbone() -> Backbone:
    return Backbone("vision_transformer", "random", TINY)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("layer", "frozen", "x"),
    [
        (nn.Linear(6, 4), FrozenLinear, torch.randn(5, 3, 6)),
        (nn.Linear(6, 4, bias=False), FrozenLinear, torch.randn(5, 6)),
        (nn.Conv2d(3, 4, 2, stride=2), FrozenConv2d, torch.randn(2, 3, 8, 8)),
    ],
)
def test_a_frozen_layer_has_the_bits_of_the_layer_in_both_precisions(
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


def test_what_was_copied_under_inference_mode_can_be_trained_through(
    backbone: Backbone, images: Tensor
) -> None:
    layer = inject(backbone, ["v"], rank=2)[0]
    with torch.inference_mode(), half():
        backbone(images)
    with half():
        backbone(images).sum().backward()
    assert layer.adapter("v").B.grad is not None


def test_what_is_saved_is_the_weight_in_full_precision(backbone: Backbone, images: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with half():
        backbone(images)
    after = backbone.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_weight_whose_gradient_is_asked_for_is_used_itself() -> None:
    layer = FrozenLinear(nn.Linear(3, 2))
    with half():
        refresh(layer)
        layer.weight.requires_grad_(True)
        layer(torch.ones(1, 3)).sum().backward()
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, torch.ones(2, 3))


def test_layers_of_a_subclass_are_left_alone() -> None:
    model = nn.Sequential(AdaptedLinear(nn.Linear(3, 2), {"v": slice(0, 2)}, rank=1), nn.Linear(2, 2))
    adapted = model[0]
    freeze_layers(model)
    assert model[0] is adapted and type(model[1]) is FrozenLinear


def test_a_first_pass_that_asks_for_weight_gradients_leaves_copies_that_do_not(
    backbone: Backbone, images: Tensor
) -> None:
    layer = inject(backbone, ("k", "v"), rank=2)[0]
    layer.weight.requires_grad_(True)
    with half():
        backbone(images).sum().backward()
    layer.weight.requires_grad_(False)
    assert layer._half_weight is not None
    assert not layer._half_weight.requires_grad


def test_a_merge_reaches_a_layer_that_is_called_by_itself(backbone: Backbone, images: Tensor) -> None:
    layer = inject(backbone, ("k",), rank=2)[0]
    with half(), torch.no_grad():
        backbone(images)
        layer.adapter("k").B.copy_(torch.ones_like(layer.adapter("k").B))
        tokens = torch.ones(1, 32)
        before = layer(tokens)
        layer.merge()
        assert torch.allclose(layer(tokens), before, atol=0.02)
        assert (before - torch.nn.functional.linear(tokens, layer.weight)).abs().max() < 0.1


def test_a_bias_whose_gradient_is_asked_for_gets_it(backbone: Backbone, images: Tensor) -> None:
    layer = inject(backbone, ("k", "v"), rank=2)[0]
    assert layer.bias is not None
    layer.bias.requires_grad_(True)
    layer(torch.ones(5, 32)).sum().backward()
    assert layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, torch.full((96,), 5.0))


def test_a_copy_of_a_compiled_backbone_runs_its_own_weights(images: Tensor) -> None:
    backbone = Backbone("vision_transformer", "random", TINY, compiler="eager")
    copied = copy.deepcopy(backbone)
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert not copied(images).any()
    assert backbone(images).any()
