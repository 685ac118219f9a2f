"""SD-LoRA: the directions of all experiences are kept, and how far the weights go along each is learnt.

A pair of factors is trained on each experience, as in LoRA. Before the next one their product is scaled to
length one and becomes a frozen *direction*, with its length as its *magnitude*. All magnitudes stay
trainable, one number for each experience, which all adapted projections share. The variant with *reduced
rank* (RR) gives later pairs lower ranks; the one with *knowledge distillation* (KD) drops a direction that
older ones nearly contain, and moves their magnitudes instead.

Source: SD-LoRA, ICLR 2025, https://arxiv.org/abs/2501.13198, and its released code,
https://github.com/WuYichen-97/SD-Lora-CL; RR and KD, which that code lacks, after the paper and LibContinual,
https://github.com/RL-VIG/LibContinual.

===============================================  ==========================================================
paper                                            here
===============================================  ==========================================================
``W_0 + Σ_k α_k N(B_k A_k) + α_t B_t A_t``       ``DirectedLinear.addend``
``N(B A) = B A / ‖B A‖_F``, Eq. 4                ``DirectedLinear.keep``, with the norms of ``_norms``
``α``: trained, one for each experience          ``magnitudes``, a parameter that all layers share
RR: rank ``r_μ`` from experience ``μ`` on        ``rank_limits``
KD: ``min_β ‖D_t - Σ_k β_k N_k‖²``, threshold τ  ``_absorb``: normal equations, from r × r products
===============================================  ==========================================================

Departures:

* The newest pair is used as it is, and scaled only when it becomes a direction: ``N(B A)`` is not defined at
  ``B = 0``, where training starts. The released code does the same.
* ``norm: model``, the default, divides all projections of one experience by the norm of all their products
  together, so that the one magnitude holds exactly what was learnt. ``matrix`` is the paper's equation: every
  product has length one, and one number cannot restore the different lengths, so the function changes before
  the next experience; the magnitude is the best one in least squares. ``factors`` is the released code, which
  divides by ``‖B‖_F ‖A‖_F``.
* Magnitudes keep their learnt values. The released code builds its network anew for every experience, and so
  loses them: all start again at 0.8, where the paper says 1. ``restart`` and ``magnitude`` follow it.
* The released code holds 20 magnitudes of older experiences from the start, whether they exist or not.
* KD decides once for the whole model, since magnitudes are shared, and compares the squared residual of the
  product as the forward pass uses it, relative to its own square. LibContinual decides for each projection,
  solves for a product without its magnitude, indexes the solution by a stale variable, and its test fails if
  directions are linearly dependent; here the solution of least norm is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import Promises, TrainingData
from cl_bench.network.adapters import AdaptedLinear, LowRank
from cl_bench.network.backbones import Backbone

_TINY = 1e-30


class DirectedLinear(AdaptedLinear):
    """An adapted layer with frozen directions, whose magnitudes are learnt, below each adapter.

    Args:
        linear: The layer to adapt; its weight and bias are frozen and shared, not copied.
        rows: Rows of the weight that each adapter adds to, by the adapter's name.
        rank: Rank of every adapter.
        scale: Factor of every adapter.

    Attributes:
        magnitudes: Factor of each experience's product, (t + 1,); the last is that of the adapters.
        owner: Experience that each of the R kept rows is from, (R,).
    """

    owner: Tensor

    def __init__(self, linear: nn.Linear, rows: Mapping[str, slice], rank: int, scale: float = 1.0) -> None:
        super().__init__(linear, rows, rank, scale)
        self.magnitudes = nn.Parameter(self.weight.new_ones(1))
        self.register_buffer("owner", self.weight.new_zeros(0, dtype=torch.int64))
        for name, own in rows.items():
            self.register_buffer(f"down_{name}", self.weight.new_zeros(0, self.weight.shape[1]))
            self.register_buffer(f"up_{name}", self.weight.new_zeros(own.stop - own.start, 0))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return all rows (R + r, n) and columns (m, R + r) of a projection, newest last, unscaled."""
        newest = self.adapter(name)
        down = torch.cat([self.get_buffer(f"down_{name}"), newest.A])
        return down, torch.cat([self.get_buffer(f"up_{name}"), newest.scale * newest.B], dim=1)

    def start(self, rank: int, magnitudes: nn.Parameter) -> None:
        """Start fresh adapters of ``rank``; the last of ``magnitudes`` (t + 1,) is theirs."""
        self.magnitudes = magnitudes
        like: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        for name, rows in self.rows.items():
            scale = float(self.adapter(name).scale)
            shape = self.weight.shape[1], rows.stop - rows.start
            self.adapters[name] = LowRank(*shape, rank, scale, **like)

    @torch.no_grad()
    def keep(self, norms: Sequence[Tensor]) -> None:
        """Let the product of every adapter, divided by its norm, be a direction of the newest experience."""
        for name, norm in zip(self.rows, norms, strict=True):
            down, up = self.factors(name)
            rank = len(self.adapter(name).A)
            up[:, -rank:] /= norm.to(up)
            self._buffers[f"down_{name}"], self._buffers[f"up_{name}"] = down, up
        newest = self.owner.new_full((rank,), len(self.magnitudes) - 1)
        self.owner = torch.cat([self.owner, newest])

    @torch.no_grad()
    def merge(self) -> None:
        """Add all directions to the weight and drop them: the function stays the same."""
        super().merge()
        for name in self.rows:
            self._buffers[f"down_{name}"] = self.get_buffer(f"down_{name}")[:0]
            self._buffers[f"up_{name}"] = self.get_buffer(f"up_{name}")[:, :0]
        self.owner = self.owner[:0]

    def addend(self, name: str) -> tuple[Tensor, Tensor, float]:
        """Return all rows and columns of a projection, with the magnitudes in the columns, and 1."""
        down, up = self.factors(name)
        rank = up.shape[1] - len(self.owner)
        each = torch.cat([self.magnitudes[self.owner], self.magnitudes[-1:].expand(rank)])
        return down, up * each, 1.0


class SDLoRA(LowRankStrategy):
    """Frozen directions with learnt magnitudes, and one adapter that is trained.

    Args:
        backbone: Pre-trained vision transformer.
        targets: Projections that carry an adapter.
        rank: Rank of the adapters.
        rank_limits: RR: pairs of an experience, from 0, and the highest rank from there on, such as
            [[4, 8], [8, 6]].
        absorb_below: KD: a direction is dropped if older ones miss less than this share of its square.
        norm: What a direction is divided by: model, matrix or factors.
        magnitude: Where the magnitude of an experience starts.
        restart: Whether all magnitudes start anew in every experience, as released.
        kwargs: Settings of every strategy with adapters.
    """

    name = "SD-LoRA"
    layer_class = DirectedLinear
    layers: list[DirectedLinear]  # type: ignore[assignment]

    def __init__(
        self,
        backbone: Backbone,
        *,
        targets: Sequence[str] = ("q", "v"),
        rank: int = 10,
        rank_limits: Sequence[tuple[int, int]] = (),
        absorb_below: float | None = None,
        norm: Literal["model", "matrix", "factors"] = "model",
        magnitude: float = 1.0,
        restart: bool = False,
        **kwargs: Any,
    ) -> None:
        if any(limit < 1 for _, limit in rank_limits) or (absorb_below is not None and absorb_below <= 0):
            raise ValueError(
                f"Rank limits {list(rank_limits)} and absorb_below {absorb_below} train or absorb nothing: "
                "give ranks of 1 or more, and a share above 0."
            )
        if restart and absorb_below is not None:
            raise ValueError(
                "A direction that is absorbed lives on in the older magnitudes, and restart resets these: "
                "leave out restart or absorb_below."
            )
        super().__init__(backbone, targets=targets, rank=rank, **kwargs)
        exact = norm == "model" and absorb_below is None and not restart
        self.promises = Promises(
            start_within=1e-5 if exact else None,  # a direction is divided by its length, which rounds
            state_grows_with=("experiences",),
            step_grows_with=("experiences",),
        )
        self.rank_limits = [tuple(limit) for limit in rank_limits]
        self.absorb_below = absorb_below
        self.norm = norm
        self.magnitude = magnitude
        self.restart = restart
        parts = {"RR": rank_limits, "KD": absorb_below is not None, "magnitudes restarted": restart}
        self.variant = " + ".join(part for part, on in parts.items() if on) or None
        self.magnitudes = nn.Parameter(torch.full((1,), magnitude))

    def renew(self) -> None:
        """Let the newest pair become a direction, and start a fresh one."""
        index = self.experience.index
        if index > 0:
            self._finish()
            old = self.magnitudes.detach()
            kept = torch.full_like(old, self.magnitude) if self.restart else old
            self.magnitudes = nn.Parameter(torch.cat([kept, kept.new_full((1,), self.magnitude)]))
        limits = [rank for first, rank in self.rank_limits if first <= index]
        for layer in self.layers:
            layer.start(min([self.rank, *limits]), self.magnitudes)

    def after_training(self, data: TrainingData) -> None:
        """Merge nothing: magnitudes stay trainable."""

    @torch.no_grad()
    def _finish(self) -> None:
        """Absorb the newest product, or keep it as a direction, whose magnitude it gets."""
        grams = [self._gram(layer, name) for layer in self.layers for name in layer.rows]
        if self._absorb(torch.stack(grams).sum(dim=0)):
            return
        squares = torch.stack([gram[-1, -1] for gram in grams])  # ‖B_t A_t‖² of each projection
        norms = self._norms(squares)
        # Nearest to α_t B_t A_t in all projections together; exactly it if all norms are the same.
        length = (squares / norms).sum() / (squares / norms.square()).sum().clamp(min=_TINY)
        self.magnitudes[-1] *= length.to(self.magnitudes)
        each = iter(norms)
        for layer in self.layers:
            layer.keep([next(each) for _ in layer.rows])

    def _norms(self, squares: Tensor) -> Tensor:
        """Return what the newest product of each projection (P,) is divided by, given their squared norms."""
        match self.norm:
            case "model":
                norms = squares.sum().sqrt().expand(len(squares))
            case "matrix":
                norms = squares.sqrt()
            case "factors":
                pairs = [one for _, one in self.adapters()]
                norms = torch.stack([one.scale * one.A.norm() * one.B.norm() for one in pairs]).double()
        return norms.clamp(min=_TINY**0.5)

    def _gram(self, layer: DirectedLinear, name: str) -> Tensor:
        """Return the inner products (t + 1, t + 1) of the products of all experiences in one projection.

        Those of one with itself and others are sums of (b_i · b_j) (a_i · a_j) over rows a of A and columns b
        of B; no product (m, n) is formed. Experiences without a direction have zeros.
        """
        down, up = (factor.double() for factor in layer.factors(name))
        count, rank = len(self.magnitudes), up.shape[1] - len(layer.owner)
        owner = torch.cat([layer.owner, layer.owner.new_full((rank,), count - 1)])
        of = nn.functional.one_hot(owner, count).to(up)
        return of.mT @ ((up.mT @ up) * (down @ down.mT)) @ of

    def _absorb(self, gram: Tensor) -> bool:
        """Move the older magnitudes towards the newest product if they nearly reach it, and report that.

        Args:
            gram: Inner products (t + 1, t + 1) of all directions in the model, the newest product last.
        """
        if self.absorb_below is None:
            return False
        newest = self.magnitudes[-1].double()
        wanted, whole = newest * gram[:-1, -1], newest.square() * gram[-1, -1]
        solution = torch.linalg.pinv(gram[:-1, :-1], hermitian=True) @ wanted  # β
        if not bool(whole - wanted @ solution < self.absorb_below * whole):
            return False
        self.magnitudes[:-1] += solution.to(self.magnitudes)
        self.magnitudes[-1] = 0
        return True
