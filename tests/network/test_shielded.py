from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cl_bench.network.adapters import AdaptedLinear, inject
from cl_bench.network.backbones import Backbone
from cl_bench.network.shielded import ShieldedLinear

Making = Callable[..., Backbone]
Fill = Callable[[Sequence[AdaptedLinear]], None]
BASIS = torch.linalg.qr(torch.randn(8, 3, generator=torch.Generator().manual_seed(0))).Q


def shielded_and_not(fill: Fill) -> tuple[ShieldedLinear, dict[str, Tensor], Tensor]:
    """Return a layer, its gradients with a shield and before, and the gradient of the whole weight."""
    torch.manual_seed(0)
    layer = ShieldedLinear(nn.Linear(8, 6), {"k": slice(0, 3), "v": slice(3, 6)}, rank=2, scale=0.5)
    fill([layer])
    x, direction = torch.randn(4, 5, 8, requires_grad=True), torch.randn(4, 5, 6)
    named = {"x": x, **dict(layer.adapters.named_parameters())}
    gradients, outputs = [], []
    for shield in (None, BASIS):
        layer.shield(shield)
        outputs.append(layer(x))
        loss = (outputs[-1] * direction).sum()
        gradients.append(dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)))
    assert torch.equal(outputs[0], outputs[1])
    full = direction.flatten(0, 1).T @ x.detach().flatten(0, 1)
    return layer, gradients[1] | {f"{name} before": value for name, value in gradients[0].items()}, full


def test_each_up_projection_gets_the_gradient_of_the_safe_update(fill: Fill) -> None:
    layer, gradients, full = shielded_and_not(fill)
    safe = full - full @ BASIS @ BASIS.T
    for target, rows in layer.rows.items():
        expected = 0.5 * safe[rows] @ layer.adapter(target).A.T
        scale = gradients[f"{target}.B before"].norm()
        assert (gradients[f"{target}.B"] - expected).norm() / scale < 1e-6
        assert (gradients[f"{target}.B before"] - expected).norm() / scale > 1e-2


def test_a_shield_changes_no_other_gradient(fill: Fill) -> None:
    _, gradients, _ = shielded_and_not(fill)
    for name in ("x", "k.A", "v.A"):
        torch.testing.assert_close(gradients[name], gradients[f"{name} before"], rtol=0, atol=1e-6)


def test_before_it_is_shielded_it_is_an_ordinary_adapted_layer(fill: Fill) -> None:
    torch.manual_seed(0)
    linear, rows = nn.Linear(8, 6), {"k": slice(0, 3), "v": slice(3, 6)}
    found: list[list[Tensor]] = []
    for kind in (AdaptedLinear, ShieldedLinear):
        torch.manual_seed(1)
        layer = kind(linear, rows, rank=2)
        fill([layer])
        y = layer(torch.ones(4, 8))
        found.append([y, *torch.autograd.grad(y.square().sum(), list(layer.adapters.parameters()))])
    assert all(map(torch.equal, *found))


def test_rows_outside_the_span_need_no_shield(fill: Fill) -> None:
    torch.manual_seed(0)
    layer = ShieldedLinear(nn.Linear(8, 6).double(), {"v": slice(0, 6)}, rank=2)
    fill([layer])
    basis = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64)).Q
    layer.adapter("v").A.data -= layer.adapter("v").A.data @ basis @ basis.T
    x, gradients = torch.randn(4, 8, dtype=torch.float64), []
    for shield in (None, basis):
        layer.shield(shield)
        gradients.append(torch.autograd.grad(layer(x).square().sum(), layer.adapter("v").B)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


def test_a_shield_costs_nothing_without_gradients_or_without_a_column(tiny_backbone: Making) -> None:
    layer = inject(tiny_backbone(), ("k", "v"), rank=2, blocks=[0], layer_class=ShieldedLinear)[0]
    assert isinstance(layer, ShieldedLinear)
    x = torch.ones(4, 32)

    def flops(basis: Tensor | None, *, gradients: bool) -> int:
        layer.shield(basis)
        with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counted:
            layer(x)
        return int(counted.get_total_flops())

    plain, basis = flops(None, gradients=True), torch.eye(32)[:, :3]
    assert flops(basis, gradients=False) == plain
    assert flops(basis[:, :0], gradients=True) == plain
    # One more product with the stacked down-projection, and its rows into the basis and back.
    assert flops(basis, gradients=True) == plain + 2 * 4 * 32 * 4 + 4 * 32 * 3 * 4


def test_a_shield_keeps_its_precision_under_mixed_precision(fill: Fill) -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 8)).Q
    layer = ShieldedLinear(nn.Linear(32, 6), {"v": slice(0, 6)}, rank=2)
    fill([layer])
    adapter, outside = layer.adapter("v"), 1e-3 * torch.randn(2, 32)
    adapter.A.data.copy_(torch.randn(2, 8) @ basis.T + outside)  # almost in the span
    layer.shield(basis)
    x, gradients = torch.randn(4, 5, 32), []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(layer(x).float().square().sum(), adapter.B)[0])
    assert gradients[1].dtype == torch.float32
    assert (gradients[1] - gradients[0]).norm() < 0.02 * gradients[0].norm()


def test_the_shield_is_not_part_of_a_checkpoint() -> None:
    layer = ShieldedLinear(nn.Linear(8, 6), {"v": slice(0, 6)}, rank=2)
    before = layer.state_dict().keys()
    layer.shield(BASIS)
    assert layer.state_dict().keys() == before


def test_a_basis_of_another_width_is_refused() -> None:
    layer = ShieldedLinear(nn.Linear(32, 6), {"v": slice(0, 6)}, rank=2)
    with pytest.raises(
        ValueError, match=r"shape \(8, 3\) does not fit .* give orthonormal columns \(32, k\)"
    ):
        layer.shield(BASIS)


def test_a_gate_or_a_learnt_scale_under_a_shield_is_refused() -> None:
    x = torch.ones(1, 8)
    for name, value in (("gate", nn.Linear(8, 1)), ("scale", nn.Parameter(torch.ones(())))):
        layer = ShieldedLinear(nn.Linear(8, 6), {"v": slice(0, 6)}, rank=2)
        setattr(layer.adapter("v"), name, value)
        layer(x)
        layer.shield(BASIS)
        with pytest.raises(ValueError, match="cannot have a gate or a learnt scale: use an AdaptedLinear"):
            layer(x)
