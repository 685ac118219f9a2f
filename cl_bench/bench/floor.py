"""The floor: the shortest training loop that one can write by hand for the adapters or prompts of a strategy.

It has the same transformer and adapters, made of the layers of PyTorch and timm, and neither Lightning nor
hooks. All adapters of a layer share one ``A`` and one ``B``, so a step does not assemble them; ``B`` stays
zero where it belongs to no adapter. Prompts are as many as the strategy makes for an image, the same for all
images, and the floor takes the query pass as well: what it does without is the choice of prompts. In half
precision it keeps frozen weights only in half precision.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.contracts.prompted import PromptedStrategy
from cl_bench.contracts.strategy import Strategy
from cl_bench.data.experience import Batch
from cl_bench.network.adapters import AdaptedLinear
from cl_bench.network.frozen import Frozen

_LEARNING_RATE = 1e-4
_COPIES = 3  # of a trained tensor: itself, and the two averages of Adam


class Unmeasurable(ValueError):
    """A strategy has no step that can be compared with the floor."""


class Floor:
    """A hand-written training of the adapters or prompts that a strategy currently has, and of a head.

    Args:
        strategy: What to copy: the transformer, its adapters, and which of their factors are trained; or its
            prompts.
        classes: Columns of the head.
        half: Whether autocast multiplies in bfloat16.

    Raises:
        Unmeasurable: If adapted layers hold something else than pairs of factors.

    Attributes:
        model: The transformer, followed by the head.
        optimizer: Adam in one kernel, over what is trained.
    """

    def __init__(self, strategy: Strategy, classes: int, *, half: bool) -> None:
        vit = copy.deepcopy(strategy.backbone.vit)
        for name, module in list(vit.named_modules()):
            if isinstance(module, Frozen):
                vit.set_submodule(name, _plain(module, torch.bfloat16 if half else torch.float32))
        head = nn.Linear(strategy.backbone.feature_dim, classes, device=strategy.device)
        features = _Prompted(vit, strategy) if isinstance(strategy, PromptedStrategy) else vit
        self.model = nn.Sequential(features, head)
        self._adapted = [module for module in vit.modules() if isinstance(module, _Adapted)]
        self._belongs = [layer.belongs for layer in self._adapted]
        self.half = half
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=_LEARNING_RATE, fused=True)

    def step(self, batch: Batch) -> None:
        """Take one step on images and labels, which count from 0."""
        images, labels = batch
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.half):
            loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        gradients = [layer.B.grad for layer in self._adapted if layer.B.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, self._belongs)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def unused_bytes(self) -> int:
        """Bytes kept only to save time: where ``B`` belongs to no adapter, and the tensor that marks it."""
        unused = sum(int((one == 0).sum()) * one.element_size() for one in self._belongs)
        return _COPIES * unused + sum(one.nbytes for one in self._belongs)


def _plain(layer: Frozen, dtype: torch.dtype) -> nn.Module:
    """Return PyTorch's own layer for ``layer``, with weights in ``dtype``."""
    if isinstance(layer, AdaptedLinear):
        return _Adapted(layer, dtype)
    plain: nn.Conv2d | nn.Linear
    if isinstance(layer, nn.Conv2d):  # over patches, which neither overlap nor are padded
        sizes = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride
        plain = nn.Conv2d(*sizes, device="meta")  # type: ignore[arg-type]
    else:
        out_features, in_features = layer.weight.shape
        plain = nn.Linear(in_features, out_features, device="meta")
    plain.weight, plain.bias = _in_type(layer, dtype)
    return plain


def _in_type(layer: Frozen, dtype: torch.dtype) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Return weight and bias of ``layer`` in ``dtype``."""
    weight, bias = (
        None if tensor is None else nn.Parameter(tensor.detach().to(dtype), requires_grad=False)
        for tensor in (layer.weight, layer.bias)
    )
    assert weight is not None
    return weight, bias


class _Adapted(nn.Module):
    """``W x + b + B (A x)``."""

    def __init__(self, layer: AdaptedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        if not layer.rows.keys() <= layer.adapters.keys():
            raise Unmeasurable(
                f"The floor is written for pairs of factors and for prompts, and {type(layer).__name__} adds "
                "something else: bench another strategy."
            )
        adapters = [(rows, layer.adapter(name)) for name, rows in layer.rows.items()]
        self.weight, self.bias = _in_type(layer, dtype)
        # The scale goes into A, so that B learns as fast as the strategy's does where A is frozen.
        self.A = nn.Parameter(
            torch.cat([adapter.scale * adapter.A.detach() for _, adapter in adapters]),
            requires_grad=any(adapter.A.requires_grad for _, adapter in adapters),
        )
        self.B = nn.Parameter(layer.weight.new_zeros(len(layer.weight), len(self.A)))
        self.belongs = torch.zeros_like(self.B, requires_grad=False)  # 1 where an adapter has its B
        start = 0
        for rows, adapter in adapters:
            block = rows, slice(start, start + len(adapter.A))
            self.B.data[block] = adapter.B.detach()
            self.belongs[block] = 1
            start += len(adapter.A)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.A), self.B)


class _Prompted(nn.Module):
    """A transformer that runs twice: for a query, and with trained prompt tokens or prefixes."""

    def __init__(self, vit: Any, strategy: PromptedStrategy) -> None:
        super().__init__()
        self.vit = vit
        query = torch.zeros(1, strategy.backbone.feature_dim, device=strategy.device)
        prompts, _ = strategy.prompts(query)
        self.tokens = None if prompts.tokens is None else nn.Parameter(prompts.tokens.detach().clone())
        prefixes = (prompts.prefixes or {}).items()
        self.prefixes = nn.ParameterDict({str(at): torch.cat(pair).detach() for at, pair in prefixes})

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            self.vit(images)
        x = self.vit._pos_embed(self.vit.patch_embed(images))
        first = self.vit.num_prefix_tokens
        if self.tokens is not None:
            x = torch.cat([x[:, :first], self.tokens.to(x.dtype).expand(len(x), -1, -1), x[:, first:]], dim=1)
        for at, block in enumerate(self.vit.blocks):
            x = self._with_prefix(block, x, self.prefixes[str(at)]) if str(at) in self.prefixes else block(x)
        x = self.vit.norm(x)
        features: Tensor
        if self.tokens is None:
            features = self.vit.forward_head(x)
        else:
            features = x[:, first : first + self.tokens.shape[1]].mean(dim=1)
        return features

    def _with_prefix(self, block: Any, x: Tensor, prefix: Tensor) -> Tensor:
        attention = block.attn
        q, k, v = attention.qkv(block.norm1(x)).chunk(3, dim=-1)
        pair = prefix.to(k.dtype)[:, None].expand(2, len(x), -1, -1)
        rows = q, torch.cat([pair[0], k], dim=1), torch.cat([pair[1], v], dim=1)
        q, k, v = (one.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for one in rows)
        if attention.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q * attention.scale @ k.mT).softmax(dim=-1) @ v
        x = x + attention.proj(y.transpose(1, 2).flatten(2))
        outputs: Tensor = x + block.mlp(block.norm2(x))
        return outputs
