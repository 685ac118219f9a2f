from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cl_bench.network.adapters import AdaptedLinear, inject
from cl_bench.network.backbones import Backbone
from cl_bench.network.product import AdaptedProduct

Making = Callable[..., Backbone]
Fill = Callable[[Sequence[AdaptedLinear]], None]


def three_adapters(fill: Fill) -> AdaptedLinear:
    """Return a layer in float64 with adapters on either half of its rows and one on all of them."""
    torch.manual_seed(0)
    rows = {"q": slice(0, 3), "k": slice(3, 6), "v": slice(0, 6)}
    layer = AdaptedLinear(nn.Linear(5, 6).double(), rows, rank=2, scale=0.5)
    fill([layer])
    return layer


def formula(layer: AdaptedLinear, x: Tensor) -> Tensor:
    """Return the outputs by one product with the whole weight."""
    whole = layer.weight + torch.zeros_like(layer.weight)
    for name, rows in layer.rows.items():
        adapter = layer.adapter(name)
        whole = whole.index_add(0, torch.arange(len(whole))[rows], adapter.scale * adapter.B @ adapter.A)
    return nn.functional.linear(x, whole, layer.bias)


@pytest.mark.parametrize("trained", ["A B", "B", "A", "A B weight"])
def test_gradients_are_those_of_the_formula(trained: str, fill: Fill) -> None:
    layer = three_adapters(fill)
    adapters = [layer.adapter(name) for name in layer.rows]
    parts: dict[str, list[Tensor]] = {
        "A": [one.A for one in adapters],
        "B": [one.B for one in adapters],
        "weight": [layer.weight],
    }
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    wanted = [x]
    for name, tensors in parts.items():
        for tensor in tensors:
            tensor.requires_grad_(name in trained.split())
        wanted += tensors if name in trained.split() else []
    torch.testing.assert_close(layer(x), formula(layer, x))
    direction = torch.randn(4, 3, 6, dtype=torch.float64)
    found = torch.autograd.grad((layer(x) * direction).sum(), wanted)
    expected = torch.autograd.grad((formula(layer, x) * direction).sum(), wanted)
    for own, right in zip(found, expected, strict=True):
        torch.testing.assert_close(own, right)


def test_gradients_of_the_factors_come_from_the_gradient_of_the_weight(fill: Fill) -> None:
    torch.manual_seed(0)
    layer = AdaptedLinear(nn.Linear(5, 6).double(), {"k": slice(2, 4)}, rank=2, scale=0.5)
    fill([layer])
    x, direction = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    (layer(x) * direction).sum().backward()
    adapter, full = layer.adapter("k"), (direction.T @ x)[2:4]
    assert adapter.A.grad is not None and adapter.B.grad is not None
    torch.testing.assert_close(adapter.A.grad, 0.5 * adapter.B.detach().T @ full)
    torch.testing.assert_close(adapter.B.grad, 0.5 * full @ adapter.A.detach().T)


def test_only_plain_adapters_take_the_fused_operation(fill: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = three_adapters(fill), torch.randn(4, 5, dtype=torch.float64)
    fused: list[bool] = []
    apply = AdaptedProduct.apply

    def counted(*arguments: Any) -> Any:
        fused.append(True)
        return apply(*arguments)

    monkeypatch.setattr(AdaptedProduct, "apply", counted)
    plain = layer(x)
    assert fused == [True]
    layer.adapter("k").scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(layer(x), plain, rtol=0, atol=1e-13)
    layer.adapter("k").scale = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
    torch.testing.assert_close(layer(x), formula(layer, x), rtol=0, atol=1e-13)
    assert fused == [True]


def test_gradients_of_plain_and_other_adapters_together_are_those_of_the_formula(fill: Fill) -> None:
    layer = three_adapters(fill)
    layer.adapter("k").scale = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.adapters.parameters()]
    found = torch.autograd.grad(layer(x).square().sum(), wanted)
    expected = torch.autograd.grad(formula(layer, x).square().sum(), wanted)
    for own, right in zip(found, expected, strict=True):
        torch.testing.assert_close(own, right)


def test_the_backward_pass_of_a_frozen_down_projection_is_one_product() -> None:
    # The input of the first block requires no gradient, and a weight never does.
    tokens, inputs, outputs, rank = 7, 5, 6, 2
    layer = AdaptedLinear(nn.Linear(inputs, outputs), {"q": slice(0, 3), "v": slice(3, 6)}, rank)
    for target in layer.rows:
        layer.adapter(target).A.requires_grad_(False)
    y = layer(torch.ones(tokens, inputs)).sum()
    with FlopCounterMode(display=False) as flops:
        y.backward()
    assert flops.get_total_flops() == 2 * tokens * (2 * rank) * outputs


def test_the_forward_pass_keeps_only_what_some_gradient_needs() -> None:
    layer = AdaptedLinear(nn.Linear(50, 60), {"v": slice(0, 60)}, rank=2)
    kept: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    layer.adapter("v").A.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.ones(7, 50))
    assert kept == [torch.Size([7, 2])]  # what B is multiplied by


def test_nothing_requires_a_gradient_before_the_first_adapter(tiny_backbone: Making, images: Tensor) -> None:
    backbone = tiny_backbone()
    inject(backbone, ("k", "v"), rank=2, blocks=[1])
    required: list[bool] = []
    for block in backbone.blocks:
        block.register_forward_pre_hook(lambda _, inputs: required.append(inputs[0].requires_grad))
    assert backbone(images).requires_grad
    assert required == [False, False]


@pytest.mark.parametrize("targets", [["k"], ["k", "v"]])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_layer_is_compiled_as_one_graph(
    targets: list[str], gradients: bool, tiny_backbone: Making, fill: Fill
) -> None:
    layer = inject(tiny_backbone(), targets, rank=2, blocks=[0])[0]
    fill([layer])
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    with torch.set_grad_enabled(gradients):
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))


def test_the_next_operation_can_write_outputs_in_place(tiny_backbone: Making, fill: Fill) -> None:
    layer = inject(tiny_backbone(), ["k"], rank=2, blocks=[0])[0]
    fill([layer])
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    A = layer.adapter("k").A
    (there,), (elsewhere,) = (
        torch.autograd.grad(relu(layer(x)).sum(), A) for relu in (torch.relu_, torch.relu)
    )
    assert torch.equal(there, elsewhere)
