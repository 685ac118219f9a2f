"""The product of a frozen linear layer with plain adapters, fused into one operation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Placement(NamedTuple):
    """Where the adapters of a layer add their products, and the scale of each."""

    rows: tuple[slice, ...]
    scales: tuple[float, ...]

    def blocks(self, up: Tensor, ranks: Sequence[int]) -> Iterator[Tensor]:
        """Yield the part of ``up`` (m, R) that belongs to each adapter, given its rank."""
        start = 0
        for rows, rank in zip(self.rows, ranks, strict=True):
            yield up[rows, start : start + rank]
            start += rank


class AdaptedProduct(torch.autograd.Function):
    """``W x + b + U (D x)``: ``D`` (R, n) stacks every ``A``, ``U`` (m, R) holds every ``s B`` on its rows.

    One wide product each way costs a quarter of adding the outputs of the adapters to their rows one by one;
    its result is added in place, forward and backward. The backward pass computes no gradient that is not
    needed: none of the weight, none of a frozen factor, none of the input if nothing before it is trained. It
    keeps no tensor that only such a gradient would need. For that reason it does not support the transforms
    of torch.func, whose forward pass does not know which gradients are needed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        placement: Placement,
        *factors_and_safe: Any,
    ) -> Tensor:
        """Return outputs (…, m) of inputs ``x`` (…, n), all in the type of ``x``.

        After ``placement`` come every ``A``, every ``B``, and ``safe`` (R, n) or None. If given, ``safe``
        replaces ``D`` in the gradient of ``U``; only :class:`~cl_bench.network.shielded.ShieldedLinear`
        gives it.
        """
        # Together with the factors: torch.compile (2.14) drops ctx if every argument has a name of its own.
        *factors, safe = factors_and_safe
        count = len(placement.rows)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        needs_A, needs_B = any(ctx.needs_input_grad[4 : 4 + count]), any(ctx.needs_input_grad[4 + count :])
        ranks = [len(A) for A in factors[:count]]
        down = torch.cat(factors[:count]).to(x.dtype)
        up = x.new_zeros(len(weight), len(down))
        for block, B, scale in zip(
            placement.blocks(up, ranks), factors[count:], placement.scales, strict=True
        ):
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
        ctx.placement, ctx.ranks, ctx.shape = placement, ranks, x.shape
        ctx.dtype = factors[0].dtype
        # A true view could not be written in place by the next operation.
        outputs: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], len(weight)])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that are needed."""
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
            blocks = ctx.placement.blocks((of_y.T @ hidden).to(dtype), ctx.ranks)
            of_B = [scale * block for scale, block in zip(ctx.placement.scales, blocks, strict=True)]
        return of_x, of_weight, of_bias, None, *of_A, *of_B, None
