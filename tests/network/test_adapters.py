from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from cl_bench.network.adapters import TARGETS, AdaptedLinear, LowRank, inject
from cl_bench.network.backbones import Backbone

TINY = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def tiny(**options: Any) -> Backbone:
    return Backbone("vision_transformer", "random", TINY | options)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def fill(layers: Sequence[AdaptedLinear], targets: Sequence[str] = TARGETS) -> None:
    # Values that a trained up-projection could have.
    generator = torch.Generator().manual_seed(1)
    for layer in layers:
        for target in layer.rows:
            if target in targets:
                torch.nn.init.normal_(layer.adapter(target).B, std=0.3, generator=generator)


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_changes_the_features_and_a_fresh_one_does_not(target: str, images: torch.Tensor) -> None:
    backbone = tiny()
    before = backbone(images)
    layers = inject(backbone, [target], rank=2)
    assert torch.equal(backbone(images), before)
    fill(layers)
    assert (backbone(images) - before).abs().max() > 1e-4  # queries hardly matter to random weights


def test_merged_and_unmerged_features_are_equal(images: torch.Tensor) -> None:
    backbone = tiny()
    before = backbone(images)
    layers = inject(backbone, TARGETS, rank=3, scale=0.5)
    fill(layers)
    unmerged = backbone(images)
    for layer in layers:
        layer.merge()
    assert (backbone(images) - unmerged).abs().max() < 1e-5
    assert (unmerged - before).abs().max() > 1e-2
    assert not any(layer.adapter(target).B.any() for layer in layers for target in layer.rows)


def test_merged_and_unmerged_features_are_equal_in_double_precision(images: torch.Tensor) -> None:
    backbone = tiny().double()
    layers = inject(backbone, TARGETS, rank=3, scale=0.5)
    fill(layers)
    unmerged = backbone(images.double())
    for layer in layers:
        layer.merge()
    assert (backbone(images.double()) - unmerged).abs().max() < 1e-12


def test_an_adapted_layer_is_the_layer_with_the_product_in_its_weight() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 6).double()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    layer = AdaptedLinear(linear, {"q": slice(0, 2), "v": slice(4, 6)}, rank=2, scale=3.0)
    fill([layer])
    weight = linear.weight.clone()
    for target, start in (("q", 0), ("v", 4)):
        adapter = layer.adapter(target)
        weight[start : start + 2] += 3.0 * adapter.B @ adapter.A
        torch.testing.assert_close(adapter.delta(), 3.0 * adapter.B @ adapter.A)
    torch.testing.assert_close(layer(x), x @ weight.T + linear.bias, rtol=0, atol=1e-13)


def test_adapting_keys_and_values_leaves_queries_untouched(images: torch.Tensor) -> None:
    layer = inject(tiny(), ("k", "v"), rank=2, blocks=[0])[0]
    before = layer.weight.clone()
    fill([layer])
    layer.merge()
    changed = (layer.weight != before).any(dim=1)
    assert changed.tolist() == [False] * 32 + [True] * 64


def test_only_the_factors_get_a_gradient(images: torch.Tensor) -> None:
    backbone = tiny()
    layers = inject(backbone, ("k", "v"), rank=2)
    fill(layers)
    backbone(images).square().sum().backward()
    with_gradient = {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    prefixes = [f"vit.blocks.{i}.attn.qkv.adapters.{target}" for i in range(2) for target in "kv"]
    assert with_gradient == {f"{prefix}.{factor}" for prefix in prefixes for factor in "AB"}


def test_gradients_of_the_factors_come_from_the_gradient_of_the_weight() -> None:
    torch.manual_seed(0)
    layer = AdaptedLinear(torch.nn.Linear(5, 6).double(), {"k": slice(2, 4)}, rank=2, scale=0.5)
    fill([layer])
    x, direction = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    (layer(x) * direction).sum().backward()
    adapter, full = layer.adapter("k"), (direction.T @ x)[2:4]
    assert adapter.A.grad is not None and adapter.B.grad is not None
    torch.testing.assert_close(adapter.A.grad, 0.5 * adapter.B.detach().T @ full)
    torch.testing.assert_close(adapter.B.grad, 0.5 * full @ adapter.A.detach().T)


def test_the_backward_pass_of_a_frozen_down_projection_is_one_product() -> None:
    # The input of the first block asks for no gradient, and a weight never does.
    tokens, inputs, outputs, rank = 7, 5, 6, 2
    layer = AdaptedLinear(torch.nn.Linear(inputs, outputs), {"q": slice(0, 3), "v": slice(3, 6)}, rank)
    for target in layer.rows:
        layer.adapter(target).A.requires_grad_(False)
    y = layer(torch.ones(tokens, inputs)).sum()
    with FlopCounterMode(display=False) as flops:
        y.backward()
    assert flops.get_total_flops() == 2 * tokens * (2 * rank) * outputs


@pytest.mark.parametrize("trained", ["A B", "B", "A", "A B weight"])
def test_gradients_are_those_of_the_formula(trained: str) -> None:
    torch.manual_seed(0)
    layer = AdaptedLinear(
        torch.nn.Linear(5, 6).double(),
        {"q": slice(0, 3), "k": slice(3, 6), "v": slice(0, 6)},
        rank=2,
        scale=0.5,
    )
    fill([layer], ["q", "k", "v"])
    parts = {"A": [], "B": [], "weight": [layer.weight]}
    for name in layer.rows:
        parts["A"].append(layer.adapter(name).A)
        parts["B"].append(layer.adapter(name).B)
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    asked = [x]
    for name, tensors in parts.items():
        for tensor in tensors:
            tensor.requires_grad_(name in trained.split())
        asked += tensors if name in trained.split() else []

    def formula() -> torch.Tensor:
        whole = layer.weight + torch.zeros(6, 5, dtype=torch.float64)
        for name, rows in layer.rows.items():
            adapter = layer.adapter(name)
            added = torch.zeros(6, 5, dtype=torch.float64).index_add(
                0, torch.arange(6)[rows], adapter.scale * adapter.B @ adapter.A
            )
            whole = whole + added
        assert layer.bias is not None
        return x @ whole.T + layer.bias

    torch.testing.assert_close(layer(x), formula())
    direction = torch.randn(4, 3, 6, dtype=torch.float64)
    found = torch.autograd.grad((layer(x) * direction).sum(), asked)
    expected = torch.autograd.grad((formula() * direction).sum(), asked)
    for own, right in zip(found, expected, strict=True):
        torch.testing.assert_close(own, right)


def test_the_forward_pass_keeps_only_what_some_gradient_needs() -> None:
    layer = AdaptedLinear(torch.nn.Linear(50, 60), {"v": slice(0, 60)}, rank=2)
    kept: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    layer.adapter("v").A.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.ones(7, 50))
    assert kept == [torch.Size([7, 2])]  # what B is multiplied with


def test_nothing_asks_for_a_gradient_before_the_first_adapter(images: torch.Tensor) -> None:
    backbone = tiny()
    inject(backbone, ("k", "v"), rank=2, blocks=[1])
    asked: list[bool] = []
    for block in backbone.blocks:
        block.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].requires_grad))
    assert backbone(images).requires_grad
    assert asked == [False, False]


def test_a_frozen_down_projection_gets_no_gradient(images: torch.Tensor) -> None:
    backbone = tiny()
    adapter = inject(backbone, ["v"], rank=2, blocks=[1])[0].adapter("v")
    adapter.A.requires_grad_(False)
    backbone(images).square().sum().backward()
    assert adapter.A.grad is None
    assert adapter.B.grad is not None and adapter.B.grad.any()


def test_resetting_and_merging_keep_the_tensors_that_an_optimiser_holds() -> None:
    layer = inject(tiny(), ["k"], rank=2)[0]
    held = [layer.weight, layer.adapter("k").A, layer.adapter("k").B]
    values = [tensor.clone() for tensor in held]
    fill([layer])
    layer.merge()
    layer.reset()
    now = [layer.weight, layer.adapter("k").A, layer.adapter("k").B]
    assert all(one is other for one, other in zip(held, now, strict=True))
    assert [torch.equal(one, other) for one, other in zip(values, now, strict=True)] == [False, False, True]


def test_a_fresh_down_projection_is_uniform_within_the_bound_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    values = LowRank(in_features=400, out_features=100, rank=50).A
    bound = 1 / math.sqrt(400)
    assert values.abs().max() <= bound
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_the_state_keeps_the_names_of_the_backbone() -> None:
    backbone = tiny()
    before = set(backbone.state_dict())
    inject(backbone, TARGETS, rank=2)
    added = set(backbone.state_dict()) - before
    assert before < set(backbone.state_dict())
    assert all(".adapters." in name for name in added)


def test_layers_come_once_each_in_the_order_of_the_blocks() -> None:
    backbone = tiny(depth=3)
    layers = inject(backbone, ("fc2", "v", "q", "fc1"), rank=2, blocks=(2, 0))
    assert [list(layer.rows) for layer in layers] == [["q", "v"], ["fc1"], ["fc2"]] * 2
    names = {id(module): name for name, module in backbone.named_modules()}
    expected = [f"vit.blocks.{i}.{name}" for i in (0, 2) for name in ("attn.qkv", "mlp.fc1", "mlp.fc2")]
    assert [names[id(layer)] for layer in layers] == expected


# The numbers are printed in the logs of InfLoRA or follow from the settings of KeepLoRA and LoDA.
@pytest.mark.parametrize(
    ("targets", "rank", "frozen", "expected"),
    [
        (("k", "v"), 10, "", 368_640),
        (("k", "v"), 10, "A", 184_320),
        (("q", "k", "v", "proj"), 16, "A", 589_824),
        ({"general": "qkv"}, 32, "", 1_179_648),
        ({"general": "qkv", "isolated": "qkv"}, 32, "A", 1_769_472),
        ({"general": "qkv"}, 64, "", 2_359_296),
        ({"general": "qkv", "isolated": "qkv"}, 64, "A", 3_538_944),
    ],
)
def test_adapters_of_vit_base_train_as_many_parameters_as_published(
    targets: Sequence[str] | dict[str, str], rank: int, frozen: str, expected: int
) -> None:
    backbone = tiny()
    with torch.device("meta"):
        backbone.vit = timm.create_model("vit_base_patch16_224", num_classes=0).requires_grad_(False)
        inject(backbone, targets, rank)
    trained = [n for n, p in backbone.named_parameters() if p.requires_grad and n.split(".")[-1] != frozen]
    assert sum(backbone.get_parameter(name).numel() for name in trained) == expected


def test_branches_of_one_projection_add_up_each_by_its_own_scale() -> None:
    torch.manual_seed(0)
    backbone = tiny().double()
    layer = inject(backbone, {"general": "qkv", "isolated": "qkv", "late": "v"}, rank=2, blocks=[0])[0]
    assert list(layer.rows) == ["late", "general", "isolated"]
    fill([layer], list(layer.rows))
    layer.adapter("general").scale, layer.adapter("isolated").scale = 0.25, 0.5
    general, isolated, late = (layer.adapter(name) for name in ("general", "isolated", "late"))
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    expected += 0.25 * x @ general.A.T @ general.B.T + 0.5 * x @ isolated.A.T @ isolated.B.T
    expected[..., 64:] += x @ late.A.T @ late.B.T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_the_effective_weight_is_what_a_merge_leaves() -> None:
    layer = inject(tiny(), {"a": "qkv", "b": "qkv", "c": "k"}, rank=2, scale=0.5, blocks=[0])[0]
    fill([layer], list(layer.rows))
    before, effective = layer.weight.clone(), layer.effective_weight()
    assert torch.equal(layer.weight, before)
    layer.merge()
    torch.testing.assert_close(layer.weight.data, effective, rtol=0, atol=1e-6)


@pytest.mark.parametrize("targets", [["k"], ["k", "v"]])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_layer_is_compiled_as_one_graph(targets: list[str], gradients: bool) -> None:
    layer = inject(tiny(), targets, rank=2, blocks=[0])[0]
    fill([layer])
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    with torch.set_grad_enabled(gradients):
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))


def test_outputs_can_be_written_in_place_by_whoever_comes_next() -> None:
    layer = inject(tiny(), ["k"], rank=2, blocks=[0])[0]
    fill([layer])
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    A = layer.adapter("k").A
    (there,), (elsewhere,) = (
        torch.autograd.grad(relu(layer(x)).sum(), A) for relu in (torch.relu_, torch.relu)
    )
    assert torch.equal(there, elsewhere)


def test_inputs_of_another_type_are_cast_by_autocast_alone() -> None:
    layer = inject(tiny(), ["k"], rank=2, blocks=[0])[0]
    x = torch.ones(2, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"float64 do not fit a layer of torch\.float32: cast either"):
        layer(x.double())


def test_merging_rounds_no_more_where_autocast_is_on() -> None:
    weights: list[torch.Tensor] = []
    for enabled in (False, True):
        layer = inject(tiny(), ("k", "v"), rank=2, blocks=[0])[0]
        for target in layer.rows:
            torch.nn.init.ones_(layer.adapter(target).A)
        fill([layer])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            weights.append(layer.effective_weight().detach())
            layer.merge()
        weights.append(layer.weight.data)
    assert torch.equal(weights[0], weights[2]) and torch.equal(weights[1], weights[3])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_subtracting_written_factors_keeps_the_function_and_merging_them_the_weight(
    dtype: torch.dtype, bound: float, images: torch.Tensor
) -> None:
    backbone = tiny().to(dtype)
    layers = inject(backbone, TARGETS, rank=3, scale=0.5)
    before, weights = backbone(images.to(dtype)), [layer.weight.clone() for layer in layers]
    fill(layers)
    assert (backbone(images.to(dtype)) - before).abs().max() > 1e-2
    for layer in layers:
        layer.subtract()
    assert all(layer.adapter(target).B.any() for layer in layers for target in layer.rows)
    assert (backbone(images.to(dtype)) - before).abs().max() < bound
    for layer in layers:
        layer.merge()
    for layer, weight in zip(layers, weights, strict=True):
        torch.testing.assert_close(layer.weight.data, weight, rtol=0, atol=1e-6)


def shielded_and_not(basis: torch.Tensor) -> tuple[AdaptedLinear, dict[str, torch.Tensor], torch.Tensor]:
    """Return a layer, its gradients with a shield less those without, and the full-weight gradient."""
    torch.manual_seed(0)
    layer = AdaptedLinear(torch.nn.Linear(8, 6), {"k": slice(0, 3), "v": slice(3, 6)}, rank=2, scale=0.5)
    fill([layer])
    x, direction = torch.randn(4, 5, 8, requires_grad=True), torch.randn(4, 5, 6)
    named = {"x": x, **dict(layer.adapters.named_parameters())}
    gradients, outputs = [], []
    for shield in (None, basis):
        layer.shield(shield)
        outputs.append(layer(x))
        loss = (outputs[-1] * direction).sum()
        gradients.append(dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)))
    assert torch.equal(outputs[0], outputs[1])
    full = direction.flatten(0, 1).T @ x.detach().flatten(0, 1)
    return layer, gradients[1] | {f"{name} before": value for name, value in gradients[0].items()}, full


def test_a_shield_gives_each_up_projection_the_gradient_of_the_safe_update() -> None:
    basis = torch.linalg.qr(torch.randn(8, 3, generator=torch.Generator().manual_seed(0))).Q
    layer, gradients, full = shielded_and_not(basis)
    safe = full - full @ basis @ basis.T
    for target, rows in layer.rows.items():
        expected = 0.5 * safe[rows] @ layer.adapter(target).A.T
        scale = gradients[f"{target}.B before"].norm()
        assert (gradients[f"{target}.B"] - expected).norm() / scale < 1e-6
        assert (gradients[f"{target}.B before"] - expected).norm() / scale > 1e-2


def test_a_shield_changes_no_other_gradient() -> None:
    basis = torch.linalg.qr(torch.randn(8, 3, generator=torch.Generator().manual_seed(0))).Q
    _, gradients, _ = shielded_and_not(basis)
    for name in ("x", "k.A", "v.A"):
        torch.testing.assert_close(gradients[name], gradients[f"{name} before"], rtol=0, atol=1e-6)


def test_a_shield_is_not_needed_where_the_rows_of_the_down_projection_avoid_the_span() -> None:
    torch.manual_seed(0)
    layer = AdaptedLinear(torch.nn.Linear(8, 6).double(), {"v": slice(0, 6)}, rank=2)
    fill([layer])
    basis = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64)).Q
    layer.adapter("v").A.data -= layer.adapter("v").A.data @ basis @ basis.T
    x, gradients = torch.randn(4, 8, dtype=torch.float64), []
    for shield in (None, basis):
        layer.shield(shield)
        gradients.append(torch.autograd.grad(layer(x).square().sum(), layer.adapter("v").B)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


def test_a_shield_costs_nothing_without_gradients_or_without_a_column() -> None:
    layer = inject(tiny(), ("k", "v"), rank=2, blocks=[0])[0]
    x = torch.ones(4, 32)

    def flops(basis: torch.Tensor | None, *, gradients: bool) -> int:
        layer.shield(basis)
        with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counted:
            layer(x)
        return int(counted.get_total_flops())

    plain, basis = flops(None, gradients=True), torch.eye(32)[:, :3]
    assert flops(basis, gradients=False) == plain
    assert flops(basis[:, :0], gradients=True) == plain
    # One more product with the stacked down-projection, and its rows into the basis and back.
    assert flops(basis, gradients=True) == plain + 2 * 4 * 32 * 4 + 4 * 32 * 3 * 4


def test_a_shield_keeps_its_precision_under_mixed_precision() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 8)).Q
    layer = AdaptedLinear(torch.nn.Linear(32, 6), {"v": slice(0, 6)}, rank=2)
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


def test_a_basis_of_another_space_is_refused() -> None:
    layer = inject(tiny(), ["k"], rank=2)[0]
    with pytest.raises(
        ValueError, match=r"shape \(8, 2\) does not fit .* give orthonormal columns \(32, k\)"
    ):
        layer.shield(torch.eye(8)[:, :2])


def test_an_unknown_target_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no adapter target .fc3.\. Did you mean fc"):
        inject(tiny(), ["k", "fc3"])


@pytest.mark.parametrize("name", ["values", "training", "a.b", ""])
def test_a_name_that_a_module_cannot_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be called '{re.escape(name)}': choose"):
        inject(tiny(), {name: "qkv"}, rank=2)


def test_a_block_outside_the_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match="no block 2 in a backbone of 2 blocks: choose from 0 to 1"):
        inject(tiny(), blocks=[0, 2])


@pytest.mark.parametrize("rank", [0, 33])
def test_a_rank_that_does_not_fit_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} does not fit .* choose a rank from 1 to 32"):
        inject(tiny(), rank=rank)


def test_a_second_adapter_in_one_layer_is_refused_and_nothing_is_replaced() -> None:
    backbone = tiny()
    inject(backbone, ("k", "v"), rank=2, blocks=[1])
    with pytest.raises(ValueError, match=r"attn.qkv already carries adapters for k, v"):
        inject(backbone, ("fc1", "q"), rank=2)
    assert sum(isinstance(module, AdaptedLinear) for module in backbone.modules()) == 1


def test_attention_that_never_calls_its_fused_layer_is_refused() -> None:
    options = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    beit = Backbone("beit_base_patch16_224", "random", options)
    with pytest.raises(ValueError, match=r"do not compute attn.qkv by one linear layer"):
        inject(beit, ["k"], rank=2)


def test_attention_without_a_fused_layer_is_refused() -> None:
    options = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    eva = Backbone("eva02_tiny_patch14_224", "random", options)
    with pytest.raises(ValueError, match=r"do not compute attn.qkv by one linear layer"):
        inject(eva, ["k"], rank=2)
