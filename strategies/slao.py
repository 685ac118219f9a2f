"""SLAO, carried over to images: one pair of factors keeps training, and a merged pair is tested.

In every experience the down-projection starts from an orthonormal basis of the rows that the last one left,
and the up-projection from where it ended. After training, the merged pair takes the new down-projection, and
its up-projection moves towards the new one by 1/√i in experience i. Images are classified with the merged
pair, so memory stays the same however long the stream is.

Source: SLAO, "Merge before Forget", ICLR 2026, https://arxiv.org/abs/2512.23017, for language models, read in
a digest. No official code was found, and there is no result on images.

=============================================  ==========================================================
paper                                          here
=============================================  ==========================================================
``A_{ft,i-1}ᵀ = Q R``, ``Q ← Q sign(diag R)``  ``before_training``
``A⁰ = Qᵀ``, ``B⁰ = B_{ft,i-1}``               ``before_training``, in place
``A_m ← A_{ft,i}``                             ``PairedLinear.average``
``B_m ← B_m + (B_{ft,i} - B_m) / √i``          ``PairedLinear.average``, i from 1
prediction by ``W_0 + B_m A_m``                ``PairedLinear.addend`` in evaluation mode
=============================================  ==========================================================

Departures:

* Carried over to images, so targets, rank, scale 1, heads and optimizer are those of InfLoRA,
  https://arxiv.org/abs/2404.00228; rank and rate of the paper are not known to us.
* A head is trained on features of the trained pair and tested on those of the merged one. They are the same
  in the first experience and differ later; the paper has no heads of its own for each experience.
* Making the rows orthonormal while ``B`` stays changes what the network computes at the start of training, as
  in the paper: a fresh down-projection of ViT-B/16 grows in length from 1.83 to √10. ``keep_function`` gives
  ``B`` the inverse change instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import Promises, TrainingData
from cl_bench.network.adapters import AdaptedLinear
from cl_bench.network.backbones import Backbone


class PairedLinear(AdaptedLinear):
    """An adapted layer with a second, merged pair below each adapter, which is used in evaluation mode.

    Args:
        linear: The layer to adapt; its weight and bias are frozen and shared, not copied.
        rows: Rows of the weight that each adapter adds to, by the adapter's name.
        rank: Rank of every adapter.
        scale: Factor of every adapter.
    """

    def __init__(self, linear: nn.Linear, rows: Mapping[str, slice], rank: int, scale: float = 1.0) -> None:
        super().__init__(linear, rows, rank, scale)
        for name in rows:
            self.register_buffer(f"merged_down_{name}", torch.zeros_like(self.adapter(name).A))
            self.register_buffer(f"merged_up_{name}", torch.zeros_like(self.adapter(name).B))

    def merged(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the merged ``A`` (r, n) and ``B`` (m, r) of an adapter."""
        return self.get_buffer(f"merged_down_{name}"), self.get_buffer(f"merged_up_{name}")

    @torch.no_grad()
    def average(self, number: int) -> None:
        """Let the merged pairs take in the trained ones of experience ``number``, from 1."""
        for name in self.rows:
            adapter, (down, up) = self.adapter(name), self.merged(name)
            down.copy_(adapter.A)
            up.add_((adapter.B - up) / number**0.5)

    def merge(self) -> None:
        """Refuse to merge: one weight cannot hold the trained pair and the merged one.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "A layer of SLAO computes one function in training and another at test time, and a weight holds "
            "one of the two: take effective_weight() in the mode whose function you want."
        )

    def addend(self, name: str) -> tuple[Tensor, Tensor, float | Tensor]:
        """Return the factors and the scale of the trained pair in training, of the merged one otherwise."""
        if self.training:
            return super().addend(name)
        return *self.merged(name), self.adapter(name).scale


class SLAO(LowRankStrategy):
    """A pair that keeps training, and its average, used at test time.

    Args:
        backbone: Pre-trained vision transformer.
        keep_function: Whether the start of an experience leaves the product as it is.
        kwargs: Settings of every strategy with adapters.
    """

    name = "SLAO"
    promises = Promises(merge_within=None)  # images are classified with another pair than the trained one
    layer_class = PairedLinear
    layers: list[PairedLinear]  # type: ignore[assignment]

    def __init__(self, backbone: Backbone, *, keep_function: bool = False, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.keep_function = keep_function
        self.variant = "carried over to images" + (", function kept" if keep_function else "")

    def renew(self) -> None:
        """Draw a pair in the first experience; later ones resume with it."""
        if self.experience.is_first:
            super().renew()

    def before_training(self, data: TrainingData) -> None:
        """Make the rows of every A orthonormal; they span what they did."""
        if self.experience.is_first:
            return
        for _, adapter in self.adapters():
            Q, R = torch.linalg.qr(adapter.A.mT.double())
            signs = torch.where(R.diagonal() < 0, -1.0, 1.0)
            adapter.A.copy_((Q * signs).mT)  # A⁰ = Qᵀ
            if self.keep_function:  # A = Rᵀ Qᵀ, so that B A = (B Rᵀ) A⁰
                adapter.B.copy_(adapter.B.double() @ (signs[:, None] * R).mT)

    def after_training(self, data: TrainingData) -> None:
        """Take the trained pair into the merged one."""
        for layer in self.layers:
            layer.average(self.experience.index + 1)
