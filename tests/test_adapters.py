from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch

from cl_bench.adapters import TARGETS, AdaptedLinear, LowRank, inject
from cl_bench.backbones import Backbone

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


def test_keys_and_values_of_vit_base_at_rank_10_train_368640_parameters() -> None:
    backbone = tiny()
    with torch.device("meta"):
        backbone.vit = timm.create_model("vit_base_patch16_224", num_classes=0).requires_grad_(False)
        inject(backbone, ("k", "v"), rank=10)
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == 368_640


def test_an_unknown_target_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="no adapter target 'fc3': did you mean fc"):
        inject(tiny(), ["k", "fc3"])


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
