"""Low-rank adapters inside the linear layers of a vision transformer.

An adapted layer computes ``y = W x + b + s B (A x)`` with the down-projection ``A`` (r, n), the up-projection
``B`` (m, r) and the scale ``s``. Queries, keys and values come from one fused layer, so the adapter of each
adds to a third of its rows.

Source: LoRA, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones import Backbone

_LAYER_OF_TARGET = {
    "q": "attn.qkv",
    "k": "attn.qkv",
    "v": "attn.qkv",
    "proj": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_THIRDS = "qkv"  # the order of the rows in a fused layer

TARGETS = tuple(_LAYER_OF_TARGET)
"""What can carry an adapter: the projections of attention, and the two layers of the MLP."""


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
        """Return what the adapter adds to the weight, s B A, (m, n)."""
        return self.scale * (self.B @ self.A)

    def extra_repr(self) -> str:
        """Sizes, as they are printed."""
        return f"{self.A.shape[1]} to {self.B.shape[0]}, rank={self.A.shape[0]}, scale={self.scale}"


class AdaptedLinear(nn.Module):
    """A frozen linear layer with an adapter on some of its rows.

    It takes over the tensors of ``linear`` under their names, so checkpoints of the backbone keep their keys.

    Args:
        linear: The layer to adapt; its weight and bias are frozen and shared, not copied.
        rows: Rows of the weight that each target owns; targets do not overlap.
        rank: Rank of every adapter.
        scale: Factor of every adapter.

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
        self.weight = linear.weight.requires_grad_(False)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        self.rows = dict(rows)
        self.adapters = nn.ModuleDict(
            {
                target: LowRank(
                    linear.in_features,
                    own.stop - own.start,
                    rank,
                    scale,
                    device=linear.weight.device,
                    dtype=linear.weight.dtype,
                )
                for target, own in self.rows.items()
            }
        )

    def adapter(self, target: str) -> LowRank:
        """Return the adapter of ``target``."""
        adapter = self.adapters[target]
        assert isinstance(adapter, LowRank)
        return adapter

    def reset(self) -> None:
        """Start every adapter anew, in place."""
        for target in self.rows:
            self.adapter(target).reset()

    @torch.no_grad()
    def merge(self) -> None:
        """Add every adapter to the weight and zero its ``B``, in place: the function stays the same."""
        for target, rows in self.rows.items():
            adapter = self.adapter(target)
            self.weight[rows] += adapter.delta()
            adapter.B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (…, n) to outputs (…, m)."""
        down, up = self._factors()
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, down), up)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return all adapters as one: ``A`` stacked (R, n), and ``s B`` (m, R) on its rows, zero elsewhere.

        One wide product each way costs a quarter of adding the targets' outputs to their rows one by one.
        """
        adapters = {target: self.adapter(target) for target in self.rows}
        down = torch.cat([adapter.A for adapter in adapters.values()])
        up = self.weight.new_zeros(self.weight.shape[0], down.shape[0])
        start = 0
        for target, adapter in adapters.items():
            stop = start + adapter.A.shape[0]
            up[self.rows[target], start:stop] = adapter.scale * adapter.B
            start = stop
        return down, up


def inject(
    backbone: Backbone,
    targets: Sequence[str] = ("k", "v"),
    rank: int = 10,
    scale: float = 1.0,
    blocks: Sequence[int] | None = None,
) -> list[AdaptedLinear]:
    """Put adapters into ``backbone``, in place, and return the adapted layers in the order of the blocks.

    A fresh adapter changes nothing. If anything is refused, the backbone stays as it was.

    Args:
        backbone: A vision transformer whose queries, keys and values are one fused layer.
        targets: Projections that get an adapter, among q, k, v, proj, fc1 and fc2.
        rank: Rank of every adapter.
        scale: Factor of every adapter.
        blocks: Which blocks, from 0; all of them if None.

    Raises:
        ValueError: If a target or block does not exist, a layer cannot carry an adapter or already does, or
            the rank does not fit.

    >>> tiny = dict(img_size=8, patch_size=4, embed_dim=32, depth=3, num_heads=2)
    >>> backbone = Backbone("vision_transformer", weights="random", options=tiny)
    >>> layers = inject(backbone, targets=("k", "v"), rank=2, blocks=(0, 1))
    >>> len(layers), layers[0].rows
    (2, {'k': slice(32, 64, None), 'v': slice(64, 96, None)})
    """
    replacements: list[tuple[nn.Module, str, AdaptedLinear]] = []
    for index in range(backbone.depth) if blocks is None else sorted(set(blocks)):
        block = _block(backbone, index)
        for name, chosen in _layers_of(targets).items():
            linear = _linear(block, name)
            rows = {target: _rows(linear, target) for target in chosen}
            replacements.append((block, name, AdaptedLinear(linear, rows, rank, scale)))
    for block, name, layer in replacements:
        block.set_submodule(name, layer)
    return [layer for _, _, layer in replacements]


def _layers_of(targets: Sequence[str]) -> dict[str, list[str]]:
    """Return which of ``targets`` each layer carries, both in the order of the forward pass."""
    for target in targets:
        if target not in _LAYER_OF_TARGET:
            match = difflib.get_close_matches(target, TARGETS, n=1)
            raise ValueError(
                f"There is no adapter target {target!r}: "
                + (f"did you mean {match[0]}?" if match else f"choose among {', '.join(TARGETS)}.")
            )
    layers: dict[str, list[str]] = {}
    for target, name in _LAYER_OF_TARGET.items():
        if target in targets:
            layers.setdefault(name, []).append(target)
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
