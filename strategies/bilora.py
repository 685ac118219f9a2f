"""BiLoRA: every experience trains a few frequencies of the weight, at random places that others rarely share.

The change of a weight is the real part of an inverse Fourier transform in two dimensions, whose spectrum is
zero but for some coefficients; only these are trained. Their places are drawn anew for each experience, the
same for all projections, and so few that the places of two experiences hardly meet: what they learn is almost
orthogonal in the space of weights. Nothing is said about features, and nothing is protected.

Source: BiLoRA, CVPR 2025, as in a copy of its released code, https://github.com/nqh-tq-32052503/BiLoRA, whose
first commit looks like a verbatim copy of the authors', which was not available; the paper was read in a
transcription.

=============================================  ============================================================
paper                                          here
=============================================  ============================================================
``F_t``: zero but for ``F_t[pos_t] = c_t``     ``SpectralLinear.spectrum_of``
``ΔW_t = s Re(ifft2(F_t))``, s = 300           ``SpectralLinear.delta_of``
``W_0 + Σ_{i≤t} ΔW_i``                         ``SpectralLinear.forward``; old ones are merged
``pos_t``: first of ``randperm``, seed 777+10t ``positions``
=============================================  ============================================================

In real numbers, ``ΔW[a, b] = s / (m n) Σ_j c_j cos(2π (u_j a / m + v_j b / n))``: a linear map of the
coefficients, with the gradient ``s / (m n) Re(fft2(G))`` at their places, if ``G`` is that of the weight.

Departures:

* Old changes are part of the weight; the released code transforms all of them again in every forward pass.
* A projection with fewer entries than ``frequencies`` trains all of them, as the released code does silently.
* The pass over the features and their clustering before each experience, left over from InfLoRA and without
  effect, are left out.
* The released code switches coefficients on by a test for ``coef_k.1`` in their name, which also holds for
  ``coef_k.10``; only the newest exist here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.network.adapters import AdaptedLinear
from cl_bench.network.backbones import Backbone


def positions(index: int, entries: int, count: int) -> Tensor:
    """Return the places (k,) of the coefficients of experience ``index`` among ``entries``, on the CPU.

    >>> positions(0, 5, 3).tolist() == positions(0, 5, 3).tolist() != positions(1, 5, 3).tolist()
    True
    """
    drawn = torch.randperm(entries, generator=torch.Generator().manual_seed(777 + 10 * index))
    return drawn[:count].clone()


class SpectralLinear(AdaptedLinear):
    """A frozen linear layer to whose rows the transforms of sparse spectra are added.

    Its adapters are vectors of coefficients, not pairs of factors.

    Args:
        linear: The layer to adapt; its weight and bias are frozen and shared, not copied.
        rows: Rows of the weight that each spectrum adds to, by its name.
        rank: Number of coefficients of each, at most.
        scale: Factor of every transform.

    Attributes:
        coefficients: Real, (k,) of each name.
    """

    def __init__(self, linear: nn.Linear, rows: Mapping[str, slice], rank: int, scale: float = 1.0) -> None:
        super().__init__(linear, {}, rank, scale)
        self.rows = dict(rows)
        self.scale = scale
        self.coefficients = nn.ParameterDict()
        for name, own in rows.items():
            entries = (own.stop - own.start) * self.weight.shape[1]
            coefficients = self.weight.new_zeros(min(rank, entries))
            self.coefficients[name] = nn.Parameter(coefficients)
            # The index of the experience decides them, so no checkpoint needs to hold them.
            self.register_buffer(f"positions_{name}", torch.zeros_like(coefficients).long(), persistent=False)

    @torch.no_grad()
    def place(self, index: int) -> None:
        """Set the places of experience ``index``, and all coefficients to zero."""
        for name, own in self.rows.items():
            entries, places = (own.stop - own.start) * self.weight.shape[1], self._places(name)
            places.copy_(positions(index, entries, len(places)))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Set all coefficients to zero, in place: the layer computes what its weight does."""
        for coefficients in self.coefficients.values():
            coefficients.zero_()

    @torch.no_grad()
    def merge(self) -> None:
        """Add every transform to the weight and zero its coefficients, in place: the function stays."""
        for rows, delta in self._deltas():
            self.weight[rows] += delta
        self.reset()
        self.follow()

    def spectrum_of(self, name: str) -> Tensor:
        """Return the spectrum (m, n) of ``name``: zero but for its coefficients."""
        rows, coefficients = self.rows[name], self.coefficients[name]
        flat = coefficients.new_zeros((rows.stop - rows.start) * self.weight.shape[1])
        spectrum: Tensor = flat.index_put((self._places(name),), coefficients)
        return spectrum.view(rows.stop - rows.start, -1)

    def delta_of(self, name: str) -> Tensor:
        """Return what ``name`` adds to its rows of the weight, (m, n), in full precision."""
        with torch.autocast(self.weight.device.type, enabled=False):
            transform: Tensor = torch.fft.ifft2(self.spectrum_of(name)).real
            return self.scale * transform

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (…, n) to outputs (…, m).

        Raises:
            ValueError: If the inputs have another type than the layer, and autocast is off.
        """
        x, _, bias = self._in_one_type(x)
        return F.linear(x, self.effective_weight().to(x.dtype), bias)

    def _places(self, name: str) -> Tensor:
        return self.get_buffer(f"positions_{name}")

    def _deltas(self) -> list[tuple[slice, Tensor]]:
        return [(rows, self.delta_of(name)) for name, rows in self.rows.items()]


class BiLoRA(LowRankStrategy):
    """A few random frequencies of every adapted weight, trained for one experience and merged.

    A step costs more than that of a pair of factors: it transforms every adapted weight, and forms its whole
    gradient.

    Args:
        backbone: Pre-trained vision transformer.
        frequencies: Coefficients of each projection.
        spectral_scale: Factor of every transform.
        kwargs: Settings of every strategy with adapters.
    """

    name = "BiLoRA"
    layer_class = SpectralLinear
    layers: list[SpectralLinear]  # type: ignore[assignment]

    def __init__(
        self, backbone: Backbone, *, frequencies: int = 3000, spectral_scale: float = 300.0, **kwargs: Any
    ) -> None:
        if frequencies < 1 or not math.isfinite(spectral_scale) or spectral_scale == 0:
            raise ValueError(
                f"{frequencies} frequencies at a scale of {spectral_scale} train nothing: give at least one, "
                "and a finite scale."
            )
        super().__init__(backbone, rank=frequencies, scale=spectral_scale, **kwargs)

    def renew(self) -> None:
        """Choose the frequencies of the experience."""
        for layer in self.layers:
            layer.place(self.experience.index)
