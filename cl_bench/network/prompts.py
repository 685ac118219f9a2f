"""Prompts in a frozen vision transformer: tokens of their own, and prefixes to keys and values.

Source: prompt tuning as in L2P, https://arxiv.org/abs/2112.08654; prefix tuning as in DualPrompt,
https://arxiv.org/abs/2204.04799, and CODA-Prompt, https://arxiv.org/abs/2211.13218.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class Prompts(NamedTuple):
    """What a method adds to the tokens of an image. Each part is the same for all images, or one per image.

    Attributes:
        tokens: Prompt tokens (P, d) or (B, P, d). They follow the class token, and registers if the model has
            them, and get no position: a method that wants one adds ``backbone.vit.pos_embed`` itself.
        prefixes: Keys and values (L, d) or (B, L, d) that the attention of a block sees before its own, by
            the index of the block. Queries stay as they are, and so does the number of tokens.
    """

    tokens: Tensor | None = None
    prefixes: Mapping[int, tuple[Tensor, Tensor]] | None = None


def prompted_tokens(vit: nn.Module, images: Tensor, prompts: Prompts) -> Tensor:
    """Return the tokens (B, N + P, d) of images (B, 3, H, W) after the final norm of a timm transformer.

    Raises:
        ValueError: If the model is not a plain vision transformer, or a prefix is meant for a block that does
            not exist or computes attention in another way.
    """
    model: Any = vit
    if not isinstance(vit, VisionTransformer):
        raise ValueError(
            f"Prompts need a plain vision transformer, and this backbone is a {type(vit).__name__}: "
            "choose another model."
        )
    prefixes = prompts.prefixes or {}
    blocks = list(model.blocks)
    _require_blocks(blocks, prefixes)
    x = model.patch_drop(model._pos_embed(model.patch_embed(images)))
    if prompts.tokens is not None:
        first, rest = x.split([model.num_prefix_tokens, x.shape[1] - model.num_prefix_tokens], dim=1)
        x = torch.cat([first, _for_each(prompts.tokens, x), rest], dim=1)
    x = model.norm_pre(x)
    for index, block in enumerate(blocks):
        x = _with_prefix(block, x, *prefixes[index]) if index in prefixes else block(x)
    tokens: Tensor = model.norm(x)
    return tokens


def pooled_tokens(vit: nn.Module, tokens: Tensor, prompts: Prompts) -> Tensor:
    """Return the features (B, d) that ``vit`` pools from tokens (B, N + P, d), the prompts left out."""
    model: Any = vit
    if prompts.tokens is not None:
        start, count = model.num_prefix_tokens, prompts.tokens.shape[-2]
        tokens = torch.cat([tokens[:, :start], tokens[:, start + count :]], dim=1)
    features: Tensor = model.forward_head(tokens)
    return features


def _with_prefix(block: Any, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Run a timm block on tokens (B, N, d); its attention sees a prefix of ``keys`` and ``values``."""
    x = x + block.drop_path1(block.ls1(_attention(block.attn, block.norm1(x), keys, values)))
    outputs: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return outputs


def _attention(attention: Any, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    def heads(tokens: Tensor) -> Tensor:
        split: Tensor = tokens.unflatten(-1, (attention.num_heads, -1))
        return split.transpose(1, 2)

    q, k, v = (heads(part) for part in attention.qkv(x).chunk(3, dim=-1))
    k = torch.cat([heads(_for_each(keys, k)), attention.k_norm(k)], dim=2)
    v = torch.cat([heads(_for_each(values, v)), v], dim=2)
    q, dropout = attention.q_norm(q), attention.attn_drop.p if attention.training else 0.0
    if attention.fused_attn:
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    else:
        x = attention.attn_drop(((q * attention.scale) @ k.mT).softmax(dim=-1)) @ v
    x = attention.norm(x.transpose(1, 2).flatten(2))
    outputs: Tensor = attention.proj_drop(attention.proj(x))
    return outputs


def _for_each(part: Tensor, like: Tensor) -> Tensor:
    """Return ``part`` (n, d) or (B, n, d) for each image of a batch, in the type of ``like``."""
    return part.expand(len(like), *part.shape[-2:]).to(like.dtype)


def _require_blocks(blocks: list[Any], prefixes: Mapping[int, object]) -> None:
    for index in prefixes:
        if not 0 <= index < len(blocks):
            raise ValueError(
                f"There is no block {index} for a prefix in a backbone of {len(blocks)} blocks: "
                f"choose from 0 to {len(blocks) - 1}."
            )
        attention = getattr(blocks[index], "attn", None)
        plain = isinstance(attention, Attention) and getattr(attention, "gate", None) is None
        if not (plain and hasattr(blocks[index], "ls2")):
            raise ValueError(
                f"Block {index} of this backbone does not compute attention as a plain vision transformer "
                "does, which a prefix needs: use prompt tokens, or choose another model."
            )
