from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import pytest
import timm
import torch
from torch import Tensor, nn

from cl_bench.network.adapters import TARGETS, AdaptedLinear, LowRank, inject
from cl_bench.network.backbones import Backbone

Making = Callable[..., Backbone]
Fill = Callable[[Sequence[AdaptedLinear]], None]


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_changes_the_features_and_a_fresh_one_does_not(
    target: str, tiny_backbone: Making, images: Tensor, fill: Fill
) -> None:
    backbone = tiny_backbone()
    before = backbone(images)
    layers = inject(backbone, [target], rank=2)
    assert torch.equal(backbone(images), before)
    fill(layers)
    assert (backbone(images) - before).abs().max() > 1e-4  # queries hardly matter to random weights


def test_merged_and_unmerged_features_are_equal(tiny_backbone: Making, images: Tensor, fill: Fill) -> None:
    backbone = tiny_backbone()
    before = backbone(images)
    layers = inject(backbone, TARGETS, rank=3, scale=0.5)
    fill(layers)
    unmerged = backbone(images)
    for layer in layers:
        layer.merge()
    assert (backbone(images) - unmerged).abs().max() < 1e-5
    assert (unmerged - before).abs().max() > 1e-2
    assert not any(layer.adapter(target).B.any() for layer in layers for target in layer.rows)


def test_merged_and_unmerged_features_are_equal_in_double_precision(
    tiny_backbone: Making, images: Tensor, fill: Fill
) -> None:
    backbone = tiny_backbone().double()
    layers = inject(backbone, TARGETS, rank=3, scale=0.5)
    fill(layers)
    unmerged = backbone(images.double())
    for layer in layers:
        layer.merge()
    assert (backbone(images.double()) - unmerged).abs().max() < 1e-12


def test_an_adapted_layer_is_the_layer_with_the_product_in_its_weight(fill: Fill) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(5, 6).double()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    layer = AdaptedLinear(linear, {"q": slice(0, 2), "v": slice(4, 6)}, rank=2, scale=3.0)
    fill([layer])
    weight = linear.weight.clone()
    for target, start in (("q", 0), ("v", 4)):
        adapter = layer.adapter(target)
        weight[start : start + 2] += 3.0 * adapter.B @ adapter.A
        torch.testing.assert_close(adapter.delta(), 3.0 * adapter.B @ adapter.A)
    torch.testing.assert_close(layer(x), x @ weight.T + linear.bias, rtol=0, atol=1e-13)


def test_adapting_keys_and_values_leaves_queries_untouched(tiny_backbone: Making, fill: Fill) -> None:
    layer = inject(tiny_backbone(), ("k", "v"), rank=2, blocks=[0])[0]
    before = layer.weight.clone()
    fill([layer])
    layer.merge()
    changed = (layer.weight != before).any(dim=1)
    assert changed.tolist() == [False] * 32 + [True] * 64


def test_only_the_factors_get_a_gradient(tiny_backbone: Making, images: Tensor, fill: Fill) -> None:
    backbone = tiny_backbone()
    layers = inject(backbone, ("k", "v"), rank=2)
    fill(layers)
    backbone(images).square().sum().backward()
    with_gradient = {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    prefixes = [f"vit.blocks.{i}.attn.qkv.adapters.{target}" for i in range(2) for target in "kv"]
    assert with_gradient == {f"{prefix}.{factor}" for prefix in prefixes for factor in "AB"}


def test_a_frozen_down_projection_gets_no_gradient(tiny_backbone: Making, images: Tensor) -> None:
    backbone = tiny_backbone()
    adapter = inject(backbone, ["v"], rank=2, blocks=[1])[0].adapter("v")
    adapter.A.requires_grad_(False)
    backbone(images).square().sum().backward()
    assert adapter.A.grad is None
    assert adapter.B.grad is not None and adapter.B.grad.any()


def test_resetting_and_merging_keep_the_tensors_that_an_optimizer_holds(
    tiny_backbone: Making, fill: Fill
) -> None:
    layer = inject(tiny_backbone(), ["k"], rank=2)[0]
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


def test_the_state_keeps_the_names_of_the_backbone(tiny_backbone: Making) -> None:
    backbone = tiny_backbone()
    before = set(backbone.state_dict())
    inject(backbone, TARGETS, rank=2)
    added = set(backbone.state_dict()) - before
    assert before < set(backbone.state_dict())
    assert all(".adapters." in name for name in added)


def test_layers_come_once_each_in_the_order_of_the_blocks(tiny_backbone: Making) -> None:
    backbone = tiny_backbone(depth=3)
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
    targets: Sequence[str] | dict[str, str], rank: int, frozen: str, expected: int, tiny_backbone: Making
) -> None:
    backbone = tiny_backbone()
    with torch.device("meta"):
        backbone.vit = timm.create_model("vit_base_patch16_224", num_classes=0).requires_grad_(False)
        inject(backbone, targets, rank)
    trained = [n for n, p in backbone.named_parameters() if p.requires_grad and n.split(".")[-1] != frozen]
    assert sum(backbone.get_parameter(name).numel() for name in trained) == expected


def test_branches_of_one_projection_add_up_each_by_its_own_scale(tiny_backbone: Making, fill: Fill) -> None:
    torch.manual_seed(0)
    backbone = tiny_backbone().double()
    layer = inject(backbone, {"general": "qkv", "isolated": "qkv", "late": "v"}, rank=2, blocks=[0])[0]
    assert list(layer.rows) == ["late", "general", "isolated"]
    fill([layer])
    layer.adapter("general").scale, layer.adapter("isolated").scale = 0.25, 0.5
    general, isolated, late = (layer.adapter(name) for name in ("general", "isolated", "late"))
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    expected += 0.25 * x @ general.A.T @ general.B.T + 0.5 * x @ isolated.A.T @ isolated.B.T
    expected[..., 64:] += x @ late.A.T @ late.B.T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_the_effective_weight_is_what_a_merge_leaves(tiny_backbone: Making, fill: Fill) -> None:
    layer = inject(tiny_backbone(), {"a": "qkv", "b": "qkv", "c": "k"}, rank=2, scale=0.5, blocks=[0])[0]
    fill([layer])
    before, effective = layer.weight.clone(), layer.effective_weight()
    assert torch.equal(layer.weight, before)
    layer.merge()
    torch.testing.assert_close(layer.weight.data, effective, rtol=0, atol=1e-6)


def test_only_autocast_casts_inputs_of_another_type(tiny_backbone: Making) -> None:
    layer = inject(tiny_backbone(), ["k"], rank=2, blocks=[0])[0]
    x = torch.ones(2, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"float64 do not fit a layer of torch\.float32: cast either"):
        layer(x.double())


def test_merging_rounds_no_more_under_autocast(tiny_backbone: Making, fill: Fill) -> None:
    weights: list[Tensor] = []
    for enabled in (False, True):
        layer = inject(tiny_backbone(), ("k", "v"), rank=2, blocks=[0])[0]
        for target in layer.rows:
            nn.init.ones_(layer.adapter(target).A)
        fill([layer])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            weights.append(layer.effective_weight().detach())
            layer.merge()
        weights.append(layer.weight.data)
    assert torch.equal(weights[0], weights[2]) and torch.equal(weights[1], weights[3])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_subtracting_written_factors_keeps_the_function_and_merging_the_weight(
    dtype: torch.dtype, bound: float, tiny_backbone: Making, images: Tensor, fill: Fill
) -> None:
    backbone = tiny_backbone().to(dtype)
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


# Adapters that are added during a stream


def test_an_added_adapter_changes_nothing_at_first_and_then_trains(
    tiny_backbone: Making, images: Tensor, fill: Fill
) -> None:
    backbone = tiny_backbone()
    layer = inject(backbone, ("k", "v"), rank=2, blocks=[0])[0]
    fill([layer])
    before = backbone(images)
    added = layer.add("second", layer.rows["v"], rank=3, scale=0.5)
    assert torch.equal(backbone(images), before)
    assert added is layer.adapter("second") and layer.rows["second"] == slice(64, 96)
    assert added.A.shape == (3, 32) and added.B.shape == (32, 3)
    backbone(images).square().sum().backward()
    assert added.B.grad is not None and added.B.grad.any()
    with torch.no_grad():
        added.B.sub_(added.B.grad)
    assert not torch.equal(backbone(images), before)


def test_an_added_adapter_adds_its_product_to_its_own_rows(tiny_backbone: Making, fill: Fill) -> None:
    torch.manual_seed(0)
    layer = inject(tiny_backbone().double(), ("k", "v"), rank=2, blocks=[0])[0]
    fill([layer])
    x = torch.randn(3, 32, dtype=torch.float64)
    before = layer(x)
    added = layer.add("second", slice(8, 24), rank=3, scale=0.5)
    nn.init.normal_(added.B)
    expected = before.clone()
    expected[:, 8:24] += 0.5 * x @ added.A.T @ added.B.T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    assert added.A.dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "error"), [("k", "already has an adapter called k: choose another"), ("a.b", "without a dot")]
)
def test_a_name_that_an_adapter_cannot_take_is_refused(name: str, error: str, tiny_backbone: Making) -> None:
    layer = inject(tiny_backbone(), ["k"], rank=2, blocks=[0])[0]
    with pytest.raises(ValueError, match=error):
        layer.add(name, slice(0, 4), rank=2)
    assert list(layer.rows) == ["k"] and list(layer.adapters) == ["k"]


def test_a_rank_beyond_the_rows_of_an_added_adapter_is_refused(tiny_backbone: Making) -> None:
    layer = inject(tiny_backbone(), ["k"], rank=2, blocks=[0])[0]
    with pytest.raises(ValueError, match=r"rank 5 does not fit .* choose a rank from 1 to 4"):
        layer.add("second", slice(0, 4), rank=5)
    assert list(layer.rows) == ["k"]


# Learnt scales and gates


def test_a_learnt_scale_gets_its_gradient_and_is_part_of_the_merged_weight(fill: Fill) -> None:
    torch.manual_seed(0)
    layer = AdaptedLinear(nn.Linear(5, 6).double(), {"v": slice(2, 6)}, rank=2)
    fill([layer])
    adapter = layer.adapter("v")
    adapter.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    x, direction = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    y, before = layer(x), layer.weight.clone()
    (y * direction).sum().backward()
    product = adapter.B.detach() @ adapter.A.detach()
    assert adapter.scale.grad is not None
    torch.testing.assert_close(adapter.scale.grad, (x @ product.T * direction[:, 2:]).sum())
    torch.testing.assert_close(layer.effective_weight().detach()[2:], before[2:] + 0.7 * product)
    layer.merge()
    torch.testing.assert_close(layer.weight.data[2:], before[2:] + 0.7 * product)
    torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-13)


def test_one_learnt_scale_may_serve_several_adapters(
    tiny_backbone: Making, images: Tensor, fill: Fill
) -> None:
    backbone = tiny_backbone()
    layers = inject(backbone, ("k", "v"), rank=2)
    fill(layers)
    shared = nn.Parameter(torch.tensor(1.0))
    plain = backbone(images)
    for layer in layers:
        for name in layer.rows:
            layer.adapter(name).scale = shared
    torch.testing.assert_close(backbone(images), plain, rtol=0, atol=1e-5)
    backbone(images).square().sum().backward()
    assert shared.grad is not None and shared.grad != 0
    assert sum(parameter is shared for parameter in backbone.parameters()) == 1


class PerImage(nn.Module):
    """A gate of a given value for each image (B), whatever its tokens (B, N, n) hold."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = torch.tensor(values)

    def forward(self, x: Tensor) -> Tensor:
        return self.values.to(x)[:, None, None]


def test_a_gate_weights_the_output_of_its_adapter_for_each_image(
    tiny_backbone: Making, images: Tensor, fill: Fill
) -> None:
    backbone = tiny_backbone()
    without = backbone(images)
    layers = inject(backbone, ("k", "v"), rank=2)
    fill(layers)
    with_adapters = backbone(images)
    for gate, expected in (
        (PerImage(1.0, 1.0, 1.0), with_adapters),
        (PerImage(0.0, 0.0, 0.0), without),
        (PerImage(1.0, 0.0, 1.0), torch.stack([with_adapters[0], without[1], with_adapters[2]])),
    ):
        for layer in layers:
            for name in layer.rows:
                layer.adapter(name).gate = gate
        torch.testing.assert_close(backbone(images), expected, rtol=0, atol=1e-5)


def test_a_gate_of_the_input_is_part_of_the_formula_and_is_trained(fill: Fill) -> None:
    torch.manual_seed(0)
    layer = AdaptedLinear(nn.Linear(5, 6).double(), {"v": slice(2, 6)}, rank=2, scale=0.5)
    fill([layer])
    adapter, gate = layer.adapter("v"), nn.Sequential(nn.Linear(5, 1), nn.Sigmoid()).double()
    adapter.gate = gate
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    expected[..., 2:] += torch.sigmoid(gate[0](x)) * (0.5 * x @ adapter.A.T @ adapter.B.T)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in gate.parameters())


def test_a_layer_with_a_gated_adapter_refuses_to_merge_and_stays_as_it_is(fill: Fill) -> None:
    layer = AdaptedLinear(nn.Linear(5, 6), {"k": slice(0, 3), "v": slice(3, 6)}, rank=2)
    fill([layer])
    layer.adapter("v").gate = PerImage(0.5)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for change in (layer.merge, layer.subtract, layer.effective_weight):
        with pytest.raises(ValueError, match="cannot be merged: keep it, or remove its gate first"):
            change()
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_gates_and_learnt_scales_work_under_mixed_precision_and_the_compiler(fill: Fill) -> None:
    torch.manual_seed(0)
    layer = AdaptedLinear(nn.Linear(32, 6), {"k": slice(0, 3), "v": slice(3, 6)}, rank=2)
    fill([layer])
    layer.adapter("k").scale = nn.Parameter(torch.tensor(0.7))
    layer.adapter("v").gate = nn.Linear(32, 1)
    x = torch.randn(2, 4, 32)
    torch.compiler.reset()
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = layer(x)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), layer(x), rtol=0.05, atol=0.05)


# What is refused


def test_an_unknown_target_is_answered_with_the_nearest(tiny_backbone: Making) -> None:
    with pytest.raises(ValueError, match=r"no adapter target .fc3.\. Did you mean fc"):
        inject(tiny_backbone(), ["k", "fc3"])


@pytest.mark.parametrize("name", ["values", "training", "a.b", ""])
def test_a_name_that_a_module_cannot_have_is_refused(name: str, tiny_backbone: Making) -> None:
    with pytest.raises(ValueError, match=f"cannot be called '{re.escape(name)}': choose"):
        inject(tiny_backbone(), {name: "qkv"}, rank=2)


def test_a_block_outside_the_backbone_is_refused(tiny_backbone: Making) -> None:
    with pytest.raises(ValueError, match="no block 2 in a backbone of 2 blocks: choose from 0 to 1"):
        inject(tiny_backbone(), blocks=[0, 2])


@pytest.mark.parametrize("rank", [0, 33])
def test_a_rank_that_does_not_fit_is_refused(rank: int, tiny_backbone: Making) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} does not fit .* choose a rank from 1 to 32"):
        inject(tiny_backbone(), rank=rank)


def test_injecting_into_an_adapted_layer_is_refused_and_replaces_nothing(tiny_backbone: Making) -> None:
    backbone = tiny_backbone()
    inject(backbone, ("k", "v"), rank=2, blocks=[1])
    with pytest.raises(ValueError, match=r"attn.qkv already carries adapters for k, v"):
        inject(backbone, ("fc1", "q"), rank=2)
    assert sum(isinstance(module, AdaptedLinear) for module in backbone.modules()) == 1


@pytest.mark.parametrize(
    "model",
    [
        "beit_base_patch16_224",  # reads the weight of its fused layer and never calls the layer
        "eva02_tiny_patch14_224",  # has three layers
    ],
)
def test_attention_without_a_called_fused_layer_is_refused(model: str) -> None:
    options = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    with pytest.raises(ValueError, match=r"do not compute attn.qkv by one linear layer"):
        inject(Backbone(model, "random", options), ["k"], rank=2)
