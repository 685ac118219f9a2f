"""Low-rank adapters inside the linear layers of a vision transformer.

An adapted layer computes ``y = W x + b + s B (A x)`` with the down-projection ``A`` (r, n), the up-projection
``B`` (m, r) and the scale ``s``. Queries, keys and values come from one fused layer, so the adapter of each
adds to a third of its rows; the target ``qkv`` is all of them. The products of adapters that share rows add
up. A method may add adapters during a stream, learn their scale, and gate them by the input.

Source: LoRA, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.errors import suggestion
from cl_bench.network.backbones import Backbone
from cl_bench.network.frozen import Frozen
from cl_bench.network.product import AdaptedProduct, Placement

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

    Args:
        in_features: Inputs of the adapted projection, ``n``.
        out_features: Outputs of the adapted projection, ``m``.
        rank: Size in between, ``r``.
        scale: Factor ``s`` of the product.
        device: Where the parameters live.
        dtype: Their type.

    Attributes:
        scale: A number, which no checkpoint holds; or a scalar parameter, which is learnt. One parameter may
            serve several adapters.
        gate: A module that maps inputs (…, n) to a factor (…, 1) of the output, or None. A gated adapter
            cannot be merged.

    Raises:
        ValueError: If the rank is not between 1 and min(m, n).

    >>> adapter = LowRank(in_features=6, out_features=4, rank=2)
    >>> adapter.A.shape, adapter.B.shape, adapter.delta().abs().sum()
    (torch.Size([2, 6]), torch.Size([4, 2]), tensor(0., grad_fn=<SumBackward0>))
    """

    scale: float | Tensor
    gate: nn.Module | None

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
        self.gate = None
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.reset()

    def reset(self) -> None:
        """Draw again, in place: ``A`` uniform within 1/sqrt(n) as a linear layer is drawn, ``B`` zero."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    @property
    def is_plain(self) -> bool:
        """Whether the scale is a number and there is no gate."""
        return self.gate is None and not isinstance(self.scale, Tensor)

    def inner(self, x: Tensor) -> Tensor:
        """Return s g(x) A x, (…, r), of inputs (…, n)."""
        inner = self.scale * F.linear(x, self.A)
        return inner if self.gate is None else self.gate(x) * inner

    def delta(self) -> Tensor:
        """Return what the adapter adds to the weight, s B A, (m, n), in full precision.

        Raises:
            ValueError: If a gate makes that depend on the input.
        """
        self.require_no_gate()
        return _delta(self.A, self.B, self.scale)

    def require_no_gate(self) -> None:
        """Check that what the adapter adds to the weight does not depend on the input.

        Raises:
            ValueError: If a gate makes it.
        """
        if self.gate is not None:
            raise ValueError(
                "A gated adapter adds something else to the weight for every input, so it cannot be merged: "
                "keep it, or remove its gate first."
            )

    def extra_repr(self) -> str:
        """Sizes, as they are printed."""
        scale = "learnt" if isinstance(self.scale, Tensor) else self.scale
        return f"{self.A.shape[1]} to {self.B.shape[0]}, rank={self.A.shape[0]}, scale={scale}"


def _delta(A: Tensor, B: Tensor, scale: float | Tensor) -> Tensor:
    """Return s B A (m, n), in full precision."""
    with torch.autocast(A.device.type, enabled=False):
        return scale * (B @ A)


class AdaptedLinear(Frozen):
    """A frozen linear layer with adapters on some of its rows.

    It takes over the tensors of ``linear`` under their names, so checkpoints of the backbone keep their keys.

    Args:
        linear: The layer to adapt; its weight and bias are frozen and shared, not copied.
        rows: Rows of the weight that each adapter adds to, by the adapter's name.
        rank: Rank of every adapter.
        scale: Factor of every adapter.

    Attributes:
        weight: ``W`` (m, n), without the adapters.
        rows: Rows of the weight that each adapter adds to, by the adapter's name.
        adapters: The :class:`LowRank` of each name.
        keeps_inputs: Whether the layer keeps the inputs of its last call, which works in compiled code too.
        inputs: What it kept (…, n), in the type in which it multiplied them; None if nothing.

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

    def __init__(self, linear: nn.Linear, rows: Mapping[str, slice], rank: int, scale: float = 1.0) -> None:
        super().__init__()
        self._take_over(linear)
        self.rows: dict[str, slice] = {}
        self.keeps_inputs = False
        self.inputs: Tensor | None = None
        self.adapters = nn.ModuleDict()
        for name, own in rows.items():
            self.add(name, own, rank, scale)

    def add(self, name: str, rows: slice, rank: int, scale: float = 1.0) -> LowRank:
        """Add a fresh adapter, which changes nothing yet, and return it.

        A method that adds adapters during a stream does so in ``expand``, before the optimizer is built.

        Args:
            name: Name of the adapter; a dot cannot be part of it.
            rows: Rows of the weight that it adds to, such as those of another: ``layer.rows["k"]``.
            rank: Its rank.
            scale: Its factor.

        Raises:
            ValueError: If the name is taken or cannot be one, or the rank does not fit.

        >>> layer = AdaptedLinear(nn.Linear(4, 6), {"k": slice(2, 4)}, rank=1)
        >>> layer.add("second", layer.rows["k"], rank=2)
        LowRank(4 to 2, rank=2, scale=1.0)
        """
        _require_name(name)
        if name in self.rows:
            raise ValueError(f"This layer already has an adapter called {name}: choose another name.")
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        adapter = LowRank(self.weight.shape[1], rows.stop - rows.start, rank, scale, **like)  # type: ignore[arg-type]
        self.adapters[name] = adapter
        self.rows[name] = rows
        return adapter

    def adapter(self, name: str) -> LowRank:
        """Return the adapter called ``name``: its target, unless :func:`inject` was given names."""
        adapter = self.adapters[name]
        assert isinstance(adapter, LowRank)
        return adapter

    def addend(self, name: str) -> tuple[Tensor, Tensor, float | Tensor]:
        """Return ``A`` (r, n), ``B`` (m, r) and the scale of what is added to the rows of ``name``.

        A layer that adds something else than its adapters' own factors overrides this.
        """
        adapter = self.adapter(name)
        return adapter.A, adapter.B, adapter.scale

    @property
    def projections(self) -> list[slice]:
        """Rows of each adapted projection; adapters on the same rows share one."""
        every = list(self.rows.values())
        return [rows for place, rows in enumerate(every) if every.index(rows) == place]

    def reset(self) -> None:
        """Draw every adapter again, in place."""
        for name in self.rows:
            self.adapter(name).reset()

    @torch.no_grad()
    def merge(self) -> None:
        """Add every adapter to the weight and zero its ``B``, in place: the function stays the same.

        Raises:
            ValueError: If an adapter has a gate.
        """
        for rows, delta in self._deltas():
            self.weight[rows] += delta
        for name in self.rows:
            self.adapter(name).B.zero_()
        self.follow()

    @torch.no_grad()
    def subtract(self) -> None:
        """Subtract every adapter from the weight, in place, and leave the factors.

        Factors that were written into a layer whose adapters added nothing then change no output, although
        ``B`` is not zero: a method may start from a product that it has measured.
        """
        for rows, delta in self._deltas():
            self.weight[rows] -= delta
        self.follow()

    def effective_weight(self) -> Tensor:
        """Return the weight with every adapter in it, W + sum of s B A, (m, n), in full precision."""
        whole = self.weight.clone()
        for rows, delta in self._deltas():
            whole[rows] += delta
        return whole

    def _deltas(self) -> list[tuple[slice, Tensor]]:
        """Return the rows and the product of every adapter; a gate is refused before anything is written."""
        for name in self.rows:
            self.adapter(name).require_no_gate()
        return [(rows, _delta(*self.addend(name))) for name, rows in self.rows.items()]

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (…, n) to outputs (…, m).

        Raises:
            ValueError: If the inputs have another type than the layer, and autocast is off.
        """
        adapters = [self.adapter(name) for name in self.rows]
        if all(adapter.is_plain for adapter in adapters):
            return self._product(x, safe=None)
        x, weight, bias = self._in_one_type(x)
        self._keep(x)
        # One product for all adapters, for the reason that AdaptedProduct gives.
        inner = torch.cat([adapter.inner(x).to(x.dtype) for adapter in adapters], dim=-1)
        ups = [
            F.pad(adapter.B.to(x.dtype), (0, 0, rows.start, len(weight) - rows.stop))
            for rows, adapter in zip(self.rows.values(), adapters, strict=True)
        ]
        return F.linear(x, weight, bias) + F.linear(inner, torch.cat(ups, dim=1))

    def _product(self, x: Tensor, safe: Tensor | None) -> Tensor:
        """Return the outputs with plain adapters by the fused operation."""
        x, weight, bias = self._in_one_type(x)
        self._keep(x)
        down, up, scales = zip(*map(self.addend, self.rows), strict=True)
        placement = Placement(tuple(self.rows.values()), tuple(map(float, scales)))
        y: Tensor = AdaptedProduct.apply(x, weight, bias, placement, *down, *up, safe)
        return y

    def _keep(self, x: Tensor) -> None:
        if self.keeps_inputs:
            self.inputs = x.detach()

    def _in_one_type(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return inputs, weight and bias in the type of autocast; without it they must have one type."""
        weight, bias = self.in_precision()
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        if x.dtype != weight.dtype:
            raise ValueError(
                f"Inputs of {x.dtype} do not fit a layer of {weight.dtype}: cast either, or use autocast."
            )
        return x, weight, bias


def inject(
    backbone: Backbone,
    targets: Sequence[str] | Mapping[str, str] = ("k", "v"),
    rank: int = 10,
    scale: float = 1.0,
    blocks: Sequence[int] | None = None,
    layer_class: type[AdaptedLinear] = AdaptedLinear,
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
        layer_class: What a linear layer becomes.

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
            replacements.append((block, name, layer_class(linear, rows, rank, scale)))
    for block, name, layer in replacements:
        block.set_submodule(name, layer)
    return [layer for _, _, layer in replacements]


def _layers_of(named: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return what each layer carries of the ``named`` targets, both in the order of the forward pass."""
    for name, target in named.items():
        _require_name(name)
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


def _require_name(name: str) -> None:
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"An adapter cannot be called {name!r}: choose a name without a dot that is not an attribute of "
            "torch's ModuleDict."
        )


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
            f"A fused layer of {linear.out_features} rows cannot be divided into equal parts for q, k and v: "
            "choose other targets or another model."
        )
    start = _THIRDS.index(target) * third
    return slice(start, start + third)
