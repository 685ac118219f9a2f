from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from cl_bench.network.adapters import inject
from cl_bench.network.backbones import Backbone
from cl_bench.network.prompts import Prompts

Making = Callable[..., Backbone]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prefix(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(*shape, seed=seed), normal(*shape, seed=seed + 1)


def prompts(*, tokens: int = 3, prefixes: int = 2) -> Prompts:
    """Return prompt tokens, the same for all images, and prefixes for both blocks."""
    return Prompts(normal(tokens, 32), {0: prefix(prefixes, 32, seed=1), 1: prefix(prefixes, 32, seed=3)})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": True},
        {"scale_attn_norm": True},
        {"init_values": 0.1},
        {"pre_norm": True},
        {"reg_tokens": 2},
        {"class_token": False, "global_pool": "avg"},
        {"global_pool": "map"},
    ],
)
def test_prompts_without_a_row_change_nothing(
    options: dict[str, Any], tiny_backbone: Making, images: Tensor
) -> None:
    backbone: Any = tiny_backbone(**options)
    empty = prompts(tokens=0, prefixes=0)
    torch.testing.assert_close(backbone(images, empty), backbone(images), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        backbone.tokens(images, empty), backbone.vit.forward_features(images), rtol=0, atol=1e-6
    )


# Prefixes


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_sees_a_prefix_before_its_own_keys_and_values(
    heads: int, tiny_backbone: Making, images: Tensor
) -> None:
    """By hand, head by head: softmax(q [Kp; K]ᵀ / √d) [Vp; V]."""
    backbone = tiny_backbone(depth=1, num_heads=heads).double()
    vit: Any = backbone.vit
    keys, values = (part.double() for part in prefix(5, 32))
    x = vit._pos_embed(vit.patch_embed(images.double()))
    block = vit.blocks[0]
    q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
    outputs = []
    for image in range(3):
        seen_keys, seen_values = torch.cat([keys, k[image]]), torch.cat([values, v[image]])
        of_heads = []
        for columns in torch.arange(32).split(32 // heads):
            scores = q[image][:, columns] @ seen_keys[:, columns].T / len(columns) ** 0.5
            of_heads.append(scores.softmax(dim=1) @ seen_values[:, columns])
        outputs.append(torch.cat(of_heads, dim=1))
    x = x + block.attn.proj(torch.stack(outputs))
    expected = vit.norm(x + block.mlp(block.norm2(x)))
    found = backbone.tokens(images.double(), Prompts(prefixes={0: (keys, values)}))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_each_image_gets_its_own_prefix(tiny_backbone: Making, images: Tensor) -> None:
    backbone, (keys, values) = tiny_backbone(), prefix(2, 4, 32)
    found = backbone(images[:2], Prompts(prefixes={1: (keys, values)}))
    for image in range(2):
        single = images[image : image + 1]
        own = backbone(single, Prompts(prefixes={1: (keys[image], values[image])}))
        other = backbone(single, Prompts(prefixes={1: (keys[image], values[1 - image])}))
        torch.testing.assert_close(found[image], own[0], rtol=0, atol=1e-5)
        assert (found[image] - other[0]).abs().max() > 1e-2


def test_a_prefix_for_all_images_is_the_same_for_each(tiny_backbone: Making, images: Tensor) -> None:
    backbone, (keys, values) = tiny_backbone(), prefix(4, 32)
    repeated = keys.expand(3, 4, 32), values.expand(3, 4, 32)
    for_all, for_each = (backbone(images, Prompts(prefixes={0: one})) for one in ((keys, values), repeated))
    assert torch.equal(for_all, for_each)


def test_a_prefix_reaches_only_the_chosen_blocks_and_adds_no_token(
    tiny_backbone: Making, images: Tensor
) -> None:
    backbone = tiny_backbone()
    inputs: list[Tensor] = []
    for block in backbone.blocks:
        block.get_submodule("attn.qkv").register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    plain, prompted = (backbone.tokens(images, one) for one in (None, Prompts(prefixes={1: prefix(4, 32)})))
    assert prompted.shape == plain.shape == (3, 5, 32)
    assert torch.equal(inputs[3], inputs[1])  # what the second block receives
    assert (prompted - plain).abs().max() > 1e-2


@pytest.mark.parametrize("fused", [True, False])
def test_a_prefix_accepts_a_batch_without_an_image(fused: bool, tiny_backbone: Making) -> None:
    """One process of several may have none of a batch."""
    backbone = tiny_backbone()
    backbone.fuse_attention(fused)
    keys, values = (torch.zeros(0, 4, 32, requires_grad=True) for _ in range(2))
    found = backbone(torch.zeros(0, 3, 8, 8), Prompts(prefixes={0: (keys, values)}))
    assert found.shape == (0, 32)
    found.sum().backward()


# Prompt tokens


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("before", [1, 3], ids=["class token", "class token and registers"])
def test_prompt_tokens_follow_the_class_token_without_a_position(
    before: int, per_image: bool, tiny_backbone: Making, images: Tensor
) -> None:
    backbone = tiny_backbone(reg_tokens=before - 1)
    vit: Any = backbone.vit
    tokens = normal(3, 2, 32) if per_image else normal(2, 32)
    x = vit._pos_embed(vit.patch_embed(images))
    x = torch.cat([x[:, :before], tokens.expand(3, 2, 32), x[:, before:]], dim=1)
    found = backbone.tokens(images, Prompts(tokens))
    torch.testing.assert_close(found, vit.norm(vit.blocks(x)), rtol=0, atol=1e-6)
    assert found.shape == (3, before + 2 + 4, 32)
    assert torch.equal(backbone(images, Prompts(tokens)), found[:, 0])


@pytest.mark.parametrize("class_token", [True, False])
def test_average_pooling_leaves_prompt_tokens_out(
    class_token: bool, tiny_backbone: Making, images: Tensor
) -> None:
    backbone = tiny_backbone(global_pool="avg", class_token=class_token)
    vit: Any = backbone.vit
    given = prompts()
    tokens = backbone.tokens(images, given)
    assert tokens.shape == (3, class_token + 3 + 4, 32)
    expected = vit.fc_norm(tokens[:, class_token + 3 :].mean(dim=1))
    torch.testing.assert_close(backbone(images, given), expected, rtol=0, atol=1e-6)
    assert (expected - vit.fc_norm(tokens.mean(dim=1))).abs().max() > 1e-2


def test_patch_dropout_drops_no_prompt_token(tiny_backbone: Making, images: Tensor) -> None:
    backbone = tiny_backbone(patch_drop_rate=0.5, global_pool="avg").train()
    given = Prompts(normal(3, 32))
    assert backbone.tokens(images, given).shape == (3, 1 + 3 + 2, 32)
    torch.manual_seed(0)
    features = backbone(images, given)
    torch.manual_seed(0)
    patches = backbone.tokens(images, given)[:, 4:]
    expected = backbone.vit.get_submodule("fc_norm")(patches.mean(dim=1))
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)


# Training


def test_gradients_reach_prompts_and_adapters_and_nothing_frozen(
    tiny_backbone: Making, images: Tensor
) -> None:
    backbone = tiny_backbone()
    given = prompts()
    assert given.tokens is not None and given.prefixes is not None
    learnt = [given.tokens, *(part for pair in given.prefixes.values() for part in pair)]
    for part in learnt:
        part.requires_grad_()
    backbone(images, given).square().sum().backward()
    assert all(part.grad is not None and part.grad.any() for part in learnt)
    assert all(parameter.grad is None for parameter in backbone.parameters())
    layers = inject(backbone, ("k", "v"), rank=2)
    backbone(images, given).square().sum().backward()
    with_gradient = {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert len(with_gradient) == len(layers) * 4 and all("adapters" in name for name in with_gradient)


def test_attention_with_a_prefix_agrees_in_one_kernel_and_as_products(
    tiny_backbone: Making, images: Tensor
) -> None:
    backbone = tiny_backbone()
    found = []
    for fused in (True, False):
        backbone.fuse_attention(fused)
        given = prompts()
        assert given.prefixes is not None
        learnt = [part.requires_grad_() for part in given.prefixes[0]]
        features = backbone(images, given)
        found.append((features, *torch.autograd.grad(features.square().sum(), learnt)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_prompts_work_under_mixed_precision(fused: bool, tiny_backbone: Making, images: Tensor) -> None:
    backbone = tiny_backbone()
    backbone.fuse_attention(fused)
    keys, values, tokens = (nn.Parameter(normal(4, 32, seed=seed)) for seed in range(3))
    given = Prompts(tokens, {0: (keys, values)})
    full = backbone(images, given)
    with torch.autocast("cpu", torch.bfloat16):
        half = backbone(images, given)
    assert (half.float() - full).norm() < 0.05 * full.norm()
    half.float().square().sum().backward()
    assert all(one.grad is not None and one.grad.dtype == torch.float32 for one in (keys, values, tokens))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_prompts_work_under_the_compiler(compiler: str, tiny_backbone: Making, images: Tensor) -> None:
    torch.compiler.reset()
    plain, compiled = tiny_backbone(), tiny_backbone(compiler=compiler)
    found = []
    for backbone in (plain, compiled):
        keys, values, tokens = (nn.Parameter(normal(4, 32, seed=seed)) for seed in range(3))
        features = backbone(images, Prompts(tokens, {0: (keys, values)}))
        features.square().sum().backward()
        found.append([features, keys.grad, values.grad, tokens.grad])
        found[-1].append(backbone.tokens(images, Prompts(tokens, {0: (keys, values)})))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_calls_with_prompts_of_one_shape_compile_once(
    counted: list[Any], tiny_backbone: Making, images: Tensor
) -> None:
    backbone = tiny_backbone(compiler="counting")
    for seed in range(4):
        tokens, keys, values = (nn.Parameter(normal(4, 32, seed=seed + i)) for i in range(3))
        backbone(images, Prompts(tokens, {0: (keys, values)})).sum().backward()
        assert len(counted) == 1
    for size in (2, 3, 2):  # a second graph serves every size of a batch
        backbone(images[:size], Prompts(tokens, {0: (keys, values)})).sum().backward()
    assert len(counted) == 2


# What is refused


@pytest.mark.parametrize("block", [-1, 2])
def test_a_prefix_for_a_block_outside_the_backbone_is_refused(
    block: int, tiny_backbone: Making, images: Tensor
) -> None:
    with pytest.raises(ValueError, match=f"no block {block} for a prefix .* 2 blocks: choose from 0 to 1"):
        tiny_backbone()(images, Prompts(prefixes={block: prefix(2, 32)}))


def test_a_prefix_for_a_block_that_attends_in_another_way_is_refused(
    tiny_backbone: Making, images: Tensor
) -> None:
    backbone = tiny_backbone(block_fn=ResPostBlock)
    assert backbone(images, Prompts(normal(3, 32))).shape == (3, 32)
    with pytest.raises(ValueError, match=r"Block 1 .* use prompt tokens, or choose another model"):
        backbone(images, Prompts(prefixes={1: prefix(2, 32)}))


@pytest.mark.parametrize("model", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_prompts_for_another_kind_of_transformer_are_refused(model: str) -> None:
    options = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    backbone, images = Backbone(model, "random", options), torch.zeros(1, 3, 32, 32)
    assert backbone.tokens(images).shape == (1, 1 + 4, 32)
    for run in (backbone, backbone.tokens):
        with pytest.raises(ValueError, match=r"need a plain vision transformer.*choose another model"):
            run(images, Prompts(normal(3, 32)))
