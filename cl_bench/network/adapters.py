"""Low-rank adapters inside the linear layers of a vision transformer.

An adapted layer computes ``y = W x + b + s B (A x)`` with the down-projection ``A`` (r, n), the up-projection
``B`` (m, r) and the scale ``s``. Queries, keys and values come from one fused layer, so the adapter of each
adds to a third of its rows; the target ``qkv`` is all of them. Where adapters share rows, their products add
up.

Source: LoRA, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cl_bench.errors import suggestion
from cl_bench.network.backbones import Backbone
from cl_bench.network.frozen import Frozen

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


class AdaptedLinear(Frozen):
    """A frozen linear layer with adapters on some of its rows.

    It takes over the tensors of ``linear`` under their names, so checkpoints of the backbone keep their keys.
    The backward pass computes no gradient that nobody asked for: none of the weight, none of a frozen factor
    alone, and none of the input where nothing before it is trained. It keeps no tensor that only such a
    gradient would need.

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
        self._take_over(linear)
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
        self.follow()

    @torch.no_grad()
    def subtract(self) -> None:
        """Take every adapter out of the weight, in place, and leave the factors.

        Factors that were written into a layer whose adapters added nothing then change no output, although
        ``B`` is not zero: a method may start from a product that it has measured.
        """
        for name, rows in self.rows.items():
            self.weight[rows] -= self.adapter(name).delta()
        self.follow()

    def effective_weight(self) -> Tensor:
        """Return the weight with every adapter in it, W + sum of s B A, (m, n), in full precision."""
        whole = self.weight.clone()
        for name, rows in self.rows.items():
            whole[rows] += self.adapter(name).delta()
        return whole

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
        """Map inputs (…, n) to outputs (…, m).

        Raises:
            ValueError: If the inputs have another type than the layer, and autocast is off.
        """
        adapters = [self.adapter(name) for name in self.rows]
        x, weight, bias = self._in_one_type(x, *self.in_precision())
        safe = None
        if self.shielded is not None and torch.is_grad_enabled() and any(a.B.requires_grad for a in adapters):
            safe = self._outside([adapter.A for adapter in adapters], self.shielded)
        places = _Places(tuple(self.rows.values()), tuple(adapter.scale for adapter in adapters))
        factors = [*(adapter.A for adapter in adapters), *(adapter.B for adapter in adapters)]
        y: Tensor = _AdaptedProduct.apply(x, weight, bias, places, *factors, safe)
        return y

    def _in_one_type(
        self, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return all three in the type of autocast where it is on; elsewhere they must have one type."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        if x.dtype != weight.dtype:
            raise ValueError(
                f"Inputs of {x.dtype} do not fit a layer of {weight.dtype}: cast either, or use autocast."
            )
        return x, weight, bias

    @staticmethod
    @torch.no_grad()
    def _outside(rows: Sequence[Tensor], basis: Tensor) -> Tensor:
        """Return all ``rows`` (R, n) without their parts in the span of ``basis`` (n, k)."""
        # Where a row lies almost in the span, half precision would lose the little that is outside.
        with torch.autocast(basis.device.type, enabled=False):
            down = torch.cat(list(rows))
            return down - (down @ basis) @ basis.T


class _Places(NamedTuple):
    """Where the adapters of a layer add their products, and the scale of each."""

    rows: tuple[slice, ...]
    scales: tuple[float, ...]

    def blocks(self, up: Tensor, ranks: Sequence[int]) -> Iterator[Tensor]:
        """Yield the part of ``up`` (m, R) that belongs to each adapter, given its rank."""
        start = 0
        for rows, rank in zip(self.rows, ranks, strict=True):
            yield up[rows, start : start + rank]
            start += rank


class _AdaptedProduct(torch.autograd.Function):
    """``W x + b + U (D x)``: ``D`` (R, n) stacks every ``A``, ``U`` (m, R) holds every ``s B`` on its rows.

    One wide product each way costs a quarter of adding the outputs of the adapters to their rows one by one,
    and what it gives is added in place, forward and backward. The transforms of torch.func are not supported:
    they take a forward pass that cannot know who asks for a gradient, and this one keeps nothing beyond that.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        places: _Places,
        *factors_and_safe: Any,
    ) -> Tensor:
        """Return outputs (…, m) of inputs ``x`` (…, n), all in the type of ``x``.

        After ``places`` come every ``A``, every ``B``, and ``safe`` (R, n) or None. If given, ``safe`` stands
        for ``D`` in the gradient of ``U``.
        """
        # An odd number: where the arguments are as many as the names, torch.compile leaves out ctx (2.14).
        *factors, safe = factors_and_safe
        count = len(places.rows)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        needs_A, needs_B = any(ctx.needs_input_grad[4 : 4 + count]), any(ctx.needs_input_grad[4 + count :])
        ranks = [len(A) for A in factors[:count]]
        down = torch.cat(factors[:count]).to(x.dtype)
        up = x.new_zeros(len(weight), len(down))
        for block, B, scale in zip(places.blocks(up, ranks), factors[count:], places.scales, strict=True):
            block.copy_(B if scale == 1 else scale * B)
        tokens = x.reshape(-1, x.shape[-1])
        hidden, y = F.linear(tokens, down), F.linear(tokens, weight, bias)
        torch.addmm(y, hidden, up.T, out=y)
        if needs_B and safe is not None:
            hidden = F.linear(tokens, safe.to(x.dtype))
        ctx.save_for_backward(
            tokens if needs_A or needs_weight else None,
            hidden if needs_B else None,
            weight if needs_x else None,
            down if needs_x else None,
            up if needs_x or needs_A else None,
        )
        ctx.places, ctx.ranks, ctx.shape = places, ranks, x.shape
        ctx.dtype = factors[0].dtype
        # A true view could not be written in place by whoever comes next.
        outputs: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], len(weight)])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that somebody asked for."""
        tokens, hidden, weight, down, up = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        count, dtype = len(ctx.ranks), ctx.dtype
        of_y = gradient.reshape(-1, gradient.shape[-1])
        of_hidden: Any = None if up is None else of_y @ up
        of_x: Any = None
        if needs_x:
            of_x = of_y @ weight
            of_x = torch.addmm(of_x, of_hidden, down, out=of_x).view(ctx.shape)
        of_weight = of_y.T @ tokens if needs_weight else None
        of_bias = of_y.sum(dim=0) if ctx.needs_input_grad[2] else None
        of_A: Sequence[Tensor | None] = [None] * count
        of_B: Sequence[Tensor | None] = [None] * count
        if any(ctx.needs_input_grad[4 : 4 + count]):
            of_A = (of_hidden.T @ tokens).to(dtype).split(ctx.ranks)
        if hidden is not None:
            blocks = ctx.places.blocks((of_y.T @ hidden).to(dtype), ctx.ranks)
            of_B = [scale * block for scale, block in zip(ctx.places.scales, blocks, strict=True)]
        return of_x, of_weight, of_bias, None, *of_A, *of_B, None


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
