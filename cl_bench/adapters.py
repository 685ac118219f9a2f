"""Low-rank adapters inside the linear layers of a vision transformer.

An adapted layer computes ``y = W x + b + s B (A x)`` with the down-projection ``A`` (r, n), the up-projection
``B`` (m, r) and the scale ``s``. Queries, keys and values come from one fused layer, so the adapter of each
adds to a third of its rows; the target ``qkv`` is all of them. Where adapters share rows, their products add
up.

Source: LoRA, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cl_bench.backbones import Backbone
from cl_bench.spelling import suggestion

_LAYER_OF_TARGET = {
    "q": "attn.qkv",
    "k": "attn.qkv",
    "v": "attn.qkv",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_THIRDS = ("q", "k", "v")  # the order of the rows in a fused layer

TARGETS = tuple(_LAYER_OF_TARGET)
"""What can carry an adapter: the projections of attention, and the two layers of the MLP.

Queries, keys and values can have one each, or share the one of ``qkv``.
"""


class LowRank(nn.Module):
    """One adapter: a down-projection ``A`` (r, n) and an up-projection ``B`` (m, r).

    Both are plain parameters: a method freezes one with ``requires_grad_(False)`` and writes them in place.
    The scale is a plain number, which a method sets when it is built: no checkpoint holds it.

    Args:
        in_features: Inputs of the adapted projection, ``n``.
        out_features: Outputs of the adapted projection, ``m``.
        rank: Size in between, ``r``.
        scale: Factor ``s`` of the product.
        device: Where the parameters live.
        dtype: Their type.

    Raises:
        ValueError: If the rank is not between 1 and min(m, n).

    >>> adapter = LowRank(in_features=6, out_features=4, rank=2)
    >>> adapter.A.shape, adapter.B.shape, adapter.delta().abs().sum()
    (torch.Size([2, 6]), torch.Size([4, 2]), tensor(0., grad_fn=<SumBackward0>))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float = 1.0,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        largest = min(in_features, out_features)
        if not 1 <= rank <= largest:
            raise ValueError(
                f"An adapter of rank {rank} does not fit a projection of {in_features} to {out_features} "
                f"features: choose a rank from 1 to {largest}."
            )
        self.scale = scale
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.reset()

    def reset(self) -> None:
        """Start anew, in place: ``A`` uniform within 1/sqrt(n) as a linear layer is drawn, ``B`` zero."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def delta(self) -> Tensor:
        """Return what the adapter adds to the weight, s B A, (m, n), in full precision."""
        with torch.autocast(self.A.device.type, enabled=False):
            return self.scale * (self.B @ self.A)

    def extra_repr(self) -> str:
        """Sizes, as they are printed."""
        return f"{self.A.shape[1]} to {self.B.shape[0]}, rank={self.A.shape[0]}, scale={self.scale}"


class AdaptedLinear(nn.Module):
    """A frozen linear layer with adapters on some of its rows.

    It takes over the tensors of ``linear`` under their names, so checkpoints of the backbone keep their keys.
    The backward pass computes no gradient that nobody asked for: none of the weight, none of a frozen factor
    alone, and none of the input where nothing before it is trained.

    Args:
        linear: The layer to adapt; its weight and bias are frozen and shared, not copied.
        rows: Rows of the weight that each adapter adds to, by the adapter's name.
        rank: Rank of every adapter.
        scale: Factor of every adapter.

    Attributes:
        weight: ``W`` (m, n), without the adapters.
        rows: As given.
        adapters: The :class:`LowRank` of each name.

    >>> _ = torch.manual_seed(0)
    >>> linear = nn.Linear(4, 6)
    >>> layer = AdaptedLinear(linear, {"k": slice(2, 4)}, rank=1)
    >>> x = torch.ones(5, 4)
    >>> torch.equal(layer(x), linear(x))  # a fresh adapter changes nothing
    True
    >>> _ = nn.init.ones_(layer.adapters["k"].B)
    >>> (layer(x) != linear(x)).all(dim=0)
    tensor([False, False,  True,  True, False, False])
    """

    shielded: Tensor | None

    def __init__(self, linear: nn.Linear, rows: Mapping[str, slice], rank: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        self.rows = dict(rows)
        self.adapters = nn.ModuleDict(
            {
                name: LowRank(
                    linear.in_features,
                    own.stop - own.start,
                    rank,
                    scale,
                    device=linear.weight.device,
                    dtype=linear.weight.dtype,
                )
                for name, own in self.rows.items()
            }
        )
        self.register_buffer("shielded", None, persistent=False)

    def adapter(self, name: str) -> LowRank:
        """Return the adapter called ``name``: its target, unless :func:`inject` was given names."""
        adapter = self.adapters[name]
        assert isinstance(adapter, LowRank)
        return adapter

    def reset(self) -> None:
        """Start every adapter anew, in place."""
        for name in self.rows:
            self.adapter(name).reset()

    @torch.no_grad()
    def merge(self) -> None:
        """Add every adapter to the weight and zero its ``B``, in place: the function stays the same."""
        for name, rows in self.rows.items():
            adapter = self.adapter(name)
            self.weight[rows] += adapter.delta()
            adapter.B.zero_()

    @torch.no_grad()
    def subtract(self) -> None:
        """Take every adapter out of the weight, in place, and leave the factors.

        Factors that were written into a layer whose adapters added nothing then change no output, although
        ``B`` is not zero: a method may start from a product that it has measured.
        """
        for name, rows in self.rows.items():
            self.weight[rows] -= self.adapter(name).delta()

    def effective_weight(self) -> Tensor:
        """Return the weight with every adapter in it, W + sum of s B A, (m, n), in full precision."""
        with torch.autocast(self.weight.device.type, enabled=False):
            down, up = self._factors()
            return self.weight + up @ down

    def shield(self, basis: Tensor | None) -> None:
        """Keep what inputs have in the span of ``basis`` (n, k) out of the gradient of every ``B``.

        Let ``G`` (m, n) be the gradient of the weight and ``P = I - V V^T`` the projector on the complement
        of the basis ``V``. The backward pass then gives ``B`` the gradient ``s G P A^T`` instead of
        ``s G A^T``. Outputs and all other gradients stay, and so does that of ``A``: its safe form
        ``s B^T G P`` is ``A.grad`` without what lies in the span. ``G`` is never formed. A training step pays
        for one more product with a down-projection, and 4 n k flops for each row of ``A``; without gradients
        nothing is paid. Where the rows of ``A`` lie outside the span, the two gradients of ``B`` agree.

        Source: the update of JANUS-LoRA, https://arxiv.org/abs/2605.28495, whose rectification starts from a
        projected full-weight gradient. Taking this product of it inside the layer is our choice.

        Args:
            basis: Orthonormal columns; None, or no column, for the ordinary gradient.

        Raises:
            ValueError: If the basis is one of another space.

        >>> layer = AdaptedLinear(nn.Linear(2, 1), {"v": slice(0, 1)}, rank=1)
        >>> _ = layer.adapter("v").A.data.copy_(torch.tensor([[1.0, 1.0]]))
        >>> layer.shield(torch.tensor([[1.0], [0.0]]))
        >>> layer(torch.tensor([[5.0, 3.0]])).sum().backward()
        >>> layer.adapter("v").B.grad  # the ordinary gradient is 8
        tensor([[3.]])
        """
        features = self.weight.shape[1]
        if basis is not None and (basis.ndim != 2 or basis.shape[0] != features):
            raise ValueError(
                f"A basis of shape {tuple(basis.shape)} does not fit inputs of {features} features: "
                f"give orthonormal columns ({features}, k), or None."
            )
        self.shielded = None if basis is None or basis.shape[1] == 0 else basis.to(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (…, n) to outputs (…, m)."""
        down, up = self._factors()
        frozen, hidden = F.linear(x, self.weight, self.bias), F.linear(x, down)
        if self.shielded is None or not (torch.is_grad_enabled() and up.requires_grad):
            return frozen + F.linear(hidden, up)
        with torch.no_grad():
            outside = F.linear(x, self._outside(down, self.shielded))
        product: Tensor = _ShieldedProduct.apply(hidden, outside, up)
        return frozen + product

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return all adapters as one: ``A`` stacked (R, n), and ``s B`` (m, R) on its rows, zero elsewhere.

        One wide product each way costs a quarter of adding the adapters' outputs to their rows one by one.
        """
        adapters = {name: self.adapter(name) for name in self.rows}
        down = torch.cat([adapter.A for adapter in adapters.values()])
        up = self.weight.new_zeros(self.weight.shape[0], down.shape[0])
        start = 0
        for name, adapter in adapters.items():
            stop = start + adapter.A.shape[0]
            up[self.rows[name], start:stop] = adapter.scale * adapter.B
            start = stop
        return down, up

    @staticmethod
    def _outside(down: Tensor, basis: Tensor) -> Tensor:
        """Return the rows of ``down`` (R, n) without their parts in the span of ``basis`` (n, k)."""
        # Where a row lies almost in the span, half precision would lose the little that is outside.
        with torch.autocast(down.device.type, enabled=False):
            return down - (down @ basis) @ basis.T


class _ShieldedProduct(torch.autograd.Function):
    """``hidden @ up.T`` (…, m), but the gradient of ``up`` (m, R) is that of ``outside @ up.T``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, outside: Tensor, up: Tensor) -> Tensor:
        """Multiply, under autocast in its type."""
        ctx.save_for_backward(outside, up)
        return F.linear(hidden, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor]:
        """Return the gradients of ``hidden`` and ``up``."""
        outside, up = ctx.saved_tensors
        of_hidden = gradient @ up.to(gradient.dtype) if ctx.needs_input_grad[0] else None
        of_up = gradient.flatten(0, -2).T @ outside.flatten(0, -2)
        return of_hidden, None, of_up.to(up.dtype)


def inject(
    backbone: Backbone,
    targets: Sequence[str] | Mapping[str, str] = ("k", "v"),
    rank: int = 10,
    scale: float = 1.0,
    blocks: Sequence[int] | None = None,
) -> list[AdaptedLinear]:
    """Put adapters into ``backbone``, in place, and return the adapted layers in the order of the blocks.

    A fresh adapter changes nothing. If anything is refused, the backbone stays as it was.

    Args:
        backbone: A vision transformer whose queries, keys and values are one fused layer.
        targets: Projections that get an adapter, among q, k, v, qkv, proj, fc1 and fc2; or the target of each
            adapter by a name, so that one projection can carry several.
        rank: Rank of every adapter.
        scale: Factor of every adapter; each has its own in ``layer.adapter(name).scale``.
        blocks: Which blocks, from 0; all of them if None.

    Raises:
        ValueError: If a target or block does not exist, a name cannot be given, a layer cannot carry an
            adapter or already does, or the rank does not fit.

    >>> tiny = dict(img_size=8, patch_size=4, embed_dim=32, depth=3, num_heads=2)
    >>> backbone = Backbone("vision_transformer", weights="random", options=tiny)
    >>> layers = inject(backbone, targets=("k", "v"), rank=2, blocks=(0, 1))
    >>> len(layers), layers[0].rows
    (2, {'k': slice(32, 64, None), 'v': slice(64, 96, None)})
    >>> backbone = Backbone("vision_transformer", weights="random", options=tiny)
    >>> inject(backbone, {"general": "qkv", "isolated": "qkv"}, rank=2)[0].rows
    {'general': slice(0, 96, None), 'isolated': slice(0, 96, None)}
    """
    named = targets if isinstance(targets, Mapping) else {target: target for target in targets}
    replacements: list[tuple[nn.Module, str, AdaptedLinear]] = []
    for index in range(backbone.depth) if blocks is None else sorted(set(blocks)):
        block = _block(backbone, index)
        for name, chosen in _layers_of(named).items():
            linear = _linear(block, name)
            rows = {adapter: _rows(linear, target) for adapter, target in chosen.items()}
            replacements.append((block, name, AdaptedLinear(linear, rows, rank, scale)))
    for block, name, layer in replacements:
        block.set_submodule(name, layer)
    return [layer for _, _, layer in replacements]


def _layers_of(named: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return what each layer carries of the ``named`` targets, both in the order of the forward pass."""
    for name, target in named.items():
        if not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"An adapter cannot be called {name!r}: choose a name without a dot that is no attribute of "
                "torch's ModuleDict."
            )
        if target not in _LAYER_OF_TARGET:
            raise ValueError(f"There is no adapter target {target!r}. {suggestion(target, TARGETS)}")
    if not named:
        raise ValueError(f"No adapter target is named: choose among {', '.join(TARGETS)}.")
    layers: dict[str, dict[str, str]] = {}
    for target, layer in _LAYER_OF_TARGET.items():
        for name, chosen in named.items():
            if chosen == target:
                layers.setdefault(layer, {})[name] = target
    return layers


def _block(backbone: Backbone, index: int) -> nn.Module:
    if not 0 <= index < backbone.depth:
        raise ValueError(
            f"There is no block {index} in a backbone of {backbone.depth} blocks: "
            f"choose from 0 to {backbone.depth - 1}."
        )
    return backbone.blocks[index]


def _linear(block: nn.Module, name: str) -> nn.Linear:
    """Return the layer ``name`` of ``block`` if an adapter in it would be seen by the forward pass."""
    parent, _, leaf = name.partition(".")
    layer = getattr(getattr(block, parent, None), leaf, None)
    if isinstance(layer, AdaptedLinear):
        raise ValueError(
            f"The layer {name} already carries adapters for {', '.join(layer.rows)}: "
            "name all targets in one call, on a fresh backbone."
        )
    # With a query bias of its own, timm's attention reads the fused weight and never calls the fused layer.
    if not isinstance(layer, nn.Linear) or getattr(block.attn, "q_bias", None) is not None:
        raise ValueError(
            f"The blocks of this backbone do not compute {name} by one linear layer, as an adapter needs: "
            "choose other targets or another model."
        )
    return layer


def _rows(linear: nn.Linear, target: str) -> slice:
    """Return the rows of ``linear`` that belong to ``target``: all, or a third of a fused layer."""
    if target not in _THIRDS:
        return slice(0, linear.out_features)
    third, remainder = divmod(linear.out_features, len(_THIRDS))
    if remainder:
        raise ValueError(
            f"A fused layer of {linear.out_features} rows is no three parts of equal size for q, k and v: "
            "choose other targets or another model."
        )
    start = _THIRDS.index(target) * third
    return slice(start, start + third)
