"""Memories of the input directions that a stream has used so far, a basis for each layer."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cl_bench.maths.subspace import (
    Energy,
    complement,
    directions_needed,
    of_unit_energy,
    require_rank,
    residual,
    spectrum,
)

FirstCount = Literal["reaching", "below"]
"""How many directions a layer takes that has none yet: enough to reach the threshold, or all that stay below.

The first is the rule of the papers. The second takes one fewer, yet at least one; the released code of
InfLoRA does so in the first experience, and reaches the threshold in all later ones.
"""


class GPM(nn.Module):
    """Gradient projection memory: for each layer a basis of the inputs met so far, which only grows.

    Its state is a buffer for each layer; a fresh memory takes a saved one of any width.

    Source: GPM, https://arxiv.org/abs/2103.09762. There the matrix of sampled inputs is decomposed; the
    second moment has the same directions and energies, and its size does not grow with the samples.

    Args:
        num_layers: Number of layers, which all have the same width.
        dim: Width of a layer's input, ``d``.
        energy: What a direction's share of the energy is measured on.
        first: How many directions a layer takes that has none yet.
        dtype: Type in which directions are stored; that of the moments they come from if None.

    >>> memory = GPM(num_layers=1, dim=3)
    >>> memory.update(torch.diag(torch.tensor([8.0, 1.0, 1.0])).expand(1, 3, 3), threshold=0.8)
    >>> memory.dims, memory.right_residual(torch.ones(1, 3), layer=0)
    ([1], tensor([[0., 1., 1.]]))
    >>> memory.update(torch.diag(torch.tensor([1.0, 1.0, 8.0])).expand(1, 3, 3), threshold=0.9)
    >>> memory.dims, memory.right_residual(torch.ones(1, 3), layer=0)
    ([2], tensor([[0., 1., 0.]]))
    """

    def __init__(
        self,
        num_layers: int,
        dim: int,
        energy: Energy = "features",
        first: FirstCount = "reaching",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.num_layers = num_layers
        self.dim = dim
        self.energy = energy
        self.first = first
        for layer in range(num_layers):
            self.register_buffer(f"basis_{layer}", torch.zeros(dim, 0))

    @property
    def dims(self) -> list[int]:
        """Dimensions that are protected, for each layer."""
        return [self.basis(layer).shape[1] for layer in range(self.num_layers)]

    def basis(self, layer: int) -> Tensor:
        """Return the basis (d, k) of what is protected in ``layer``."""
        return self.get_buffer(f"basis_{layer}")

    @property
    def most_bytes(self) -> int:
        """Bytes of a memory that is as large as it can become."""
        return self.num_layers * self.dim * self._most_stored * (self.dtype or torch.float64).itemsize

    @property
    def _most_stored(self) -> int:
        """Directions of a layer that are stored at most."""
        return self.dim

    def adopt(self, layer: int, basis: Tensor) -> None:
        """Protect the span of ``basis`` (d, k), orthonormal, in a layer that protects nothing yet.

        Raises:
            ValueError: If the layer protects something.
        """
        if self.dims[layer]:
            raise ValueError(f"Layer {layer} protects {self.dims[layer]} directions: adopt a basis before.")
        self._buffers[f"basis_{layer}"] = basis.to(self.dtype or basis.dtype)

    def residual(self, x: Tensor, layer: int) -> Tensor:
        """Remove from the columns of ``x`` (d, n) what is protected in ``layer``, in the type of ``x``."""
        return residual(x, self.basis(layer).to(x.dtype))

    def right_residual(self, x: Tensor, layer: int) -> Tensor:
        """Remove from the rows of ``x`` (m, d) what is protected in ``layer``, in the type of ``x``."""
        return self.residual(x.mT, layer).mT

    @torch.no_grad()
    def update(self, moments: Tensor, threshold: float, most: int | None = None) -> None:
        """Protect, in each layer, the strongest new directions until ``threshold`` of the energy is held.

        What is protected already stays as it is, and counts with what it holds of these moments. The new
        directions are the strongest eigenvectors of ``P M P``, where ``P`` projects onto what is free and
        ``M`` is the second moment, or its square for the energy of the covariance.

        Source: GPM, https://arxiv.org/abs/2103.09762, equations 5, 8 and 9.

        Args:
            moments: Second moments (L, d, d) of the inputs of the experience that was just learnt.
            threshold: Share of their energy to hold, in [0, 1].
            most: Most new directions of a layer, where no more are known; a layer that needs more gets a
                warning.

        Raises:
            ValueError: If the moments do not fit, are zero or not finite, or the threshold is no share.
        """
        self._require_width(moments)
        shares, directions = self._free_spectrum(of_unit_energy(moments, self.energy))
        counts = directions_needed(shares, threshold).tolist()
        for layer, (held, needed) in enumerate(zip(self.dims, counts, strict=True)):
            count = max(needed - 1, 1) if held == 0 and self.first == "below" else needed
            if most is not None and count > most:
                warnings.warn(
                    f"Layer {layer} needs {count} new directions to hold {threshold:.3f} of the energy, and "
                    f"{most} are known: keep more of them, or lower the threshold.",
                    stacklevel=2,
                )
                count = most
            if count > 0:
                free = directions[layer, :, : self.dim - held].to(self.dtype or moments.dtype)
                self._protect(layer, free[:, :count], rest=free[:, count:])

    @torch.no_grad()
    def free_directions(self, x: Tensor, rank: int, short: Literal["refuse", "zeros"] = "refuse") -> Tensor:
        """Return the strongest directions of ``x`` (L, d, n) that are free, (L, d, rank), strongest first.

        They are left singular vectors of ``P x``, where ``P`` projects onto what is free. If ``P x`` has
        fewer than ``rank``, other free directions complete them.

        Source: with second moments as ``x``, the down-projections of InfLoRA,
        https://arxiv.org/abs/2404.00228; with transposed gradients, those of KeepLoRA,
        https://arxiv.org/abs/2601.19659.

        Args:
            x: One matrix for each layer.
            rank: Number of directions in each layer.
            short: What becomes of a layer with fewer free dimensions than ``rank``: it is refused, since an
                adapter that shrank by itself would go unnoticed, or gets zeros in their place and a warning.

        Raises:
            ValueError: If a layer is refused; or if a matrix does not fit, is zero or not finite.
        """
        require_rank(rank, self.dim)
        self._require_width(x)
        free = [self.dim - held for held in self.dims]
        if min(free) < rank:
            message = self._shortage(free, rank)
            if short == "refuse":
                raise ValueError(
                    f"{message}: lower the rank, or the energy threshold so that less is protected."
                )
            warnings.warn(f"{message}: its adapters learn in those alone.", stacklevel=2)
        wide = x.double()
        gram = of_unit_energy(wide @ wide.mT, "features")
        found = self._free_spectrum(gram)[1][..., :rank].to(x.dtype, copy=True)
        for layer, room in enumerate(free):
            found[layer, :, room:] = 0
        return found

    def _shortage(self, free: list[int], rank: int) -> str:
        layer = next(layer for layer, room in enumerate(free) if room < rank)
        return f"Layer {layer} has {free[layer]} of {self.dim} dimensions free, fewer than the rank {rank}"

    @torch.no_grad()
    def held_energy(self, moments: Tensor) -> Tensor:
        """Return which share of the energy of second moments (L, d, d) is protected, (L,), float64."""
        self._require_width(moments)
        whole = of_unit_energy(moments, self.energy)
        free = torch.stack([self.residual(whole[layer], layer).trace() for layer in range(self.num_layers)])
        return (1 - free).clamp(0, 1)

    def _protect(self, layer: int, new: Tensor, rest: Tensor) -> None:
        """Add the directions ``new`` (d, q) to ``layer``; ``rest`` is a basis of what then is still free."""
        self._buffers[f"basis_{layer}"] = torch.cat([self.basis(layer).to(new.dtype), new], dim=1)

    def _projector(self, layer: int) -> Tensor:
        """Return the projector (d, d) onto what is protected in ``layer``, float64."""
        basis = self.basis(layer).double()
        return basis @ basis.mT

    def _free_spectrum(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues (L, d) and eigenvectors (L, d, d) of ``P M P``, free directions first.

        ``M`` has trace one. Taking ``V V^T`` away gives the protected directions the eigenvalue -1, so no
        eigenvector mixes them with free ones that have no energy either. One call decomposes all layers.
        """
        shifted = [
            self.right_residual(self.residual(whole[layer], layer), layer) - self._projector(layer)
            for layer in range(self.num_layers)
        ]
        return spectrum(torch.stack(shifted))

    def _require_width(self, x: Tensor) -> None:
        if x.ndim != 3 or x.shape[:2] != (self.num_layers, self.dim):
            raise ValueError(
                f"Matrices of shape {tuple(x.shape)} do not fit a memory of {self.num_layers} layers of "
                f"width {self.dim}: stack one matrix of {self.dim} rows for each layer."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A saved basis may have another width and type than this one.
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if saved is not None and buffer is not None and saved.shape[:-1] == buffer.shape[:-1]:
                self._buffers[name] = torch.empty_like(saved, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class DualGPM(GPM):
    """A memory that stores whichever is smaller: a basis of what is protected, or of what is still free.

    It answers as :class:`GPM` does and stores at most d/2 columns for a layer, in a buffer that is named
    after the form: ``basis`` or ``complement``.

    Source: InfLoRA, https://arxiv.org/abs/2404.00228. If the first experience takes half of the dimensions
    or more, the released code keeps its directions and later takes them for the free ones; here they stay
    protected.

    Args:
        num_layers: Number of layers, which all have the same width.
        dim: Width of a layer's input, ``d``.
        energy: What a direction's share of the energy is measured on.
        first: How many directions a layer takes that has none yet.

    >>> memory = DualGPM(num_layers=1, dim=3)
    >>> memory.update(torch.diag(torch.tensor([8.0, 4.0, 1.0])).expand(1, 3, 3), threshold=0.9)
    >>> memory.dims, memory.right_residual(torch.ones(1, 3), layer=0)
    ([2], tensor([[0., 0., 1.]]))
    >>> {name: tuple(stored.shape) for name, stored in memory.state_dict().items()}
    {'complement_0': (3, 1)}
    """

    def __init__(
        self,
        num_layers: int,
        dim: int,
        energy: Energy = "features",
        first: FirstCount = "reaching",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_layers, dim, energy, first, dtype)
        for layer in range(num_layers):
            self.register_buffer(f"complement_{layer}", None)

    @property
    def dims(self) -> list[int]:
        """Dimensions that are protected, for each layer."""
        found = []
        for layer in range(self.num_layers):
            free = self._complement(layer)
            found.append(super().basis(layer).shape[1] if free is None else self.dim - free.shape[1])
        return found

    @property
    def _most_stored(self) -> int:
        return self.dim // 2

    def basis(self, layer: int) -> Tensor:
        """Return a basis (d, k) of what is protected in ``layer``, made anew if the other form is stored."""
        free = self._complement(layer)
        return super().basis(layer) if free is None else complement(free)

    def residual(self, x: Tensor, layer: int) -> Tensor:
        """Remove from the columns of ``x`` (d, n) what is protected in ``layer``, in the type of ``x``."""
        free = self._complement(layer)
        if free is None:
            return super().residual(x, layer)
        free = free.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return free @ (free.mT @ x)

    def _protect(self, layer: int, new: Tensor, rest: Tensor) -> None:
        if 2 * rest.shape[1] >= self.dim:
            super()._protect(layer, new, rest)
        else:
            # A view would keep the eigenvectors of all layers alive, and in checkpoints.
            self._store(layer, basis=None, free=rest.clone())

    def _projector(self, layer: int) -> Tensor:
        free = self._complement(layer)
        if free is None:
            return super()._projector(layer)
        free = free.double()
        return torch.eye(self.dim, dtype=free.dtype, device=free.device) - free @ free.mT

    def _complement(self, layer: int) -> Tensor | None:
        return self._buffers[f"complement_{layer}"]

    def _store(self, layer: int, basis: Tensor | None, free: Tensor | None) -> None:
        self._buffers[f"basis_{layer}"] = basis
        self._buffers[f"complement_{layer}"] = free

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The form of each layer is that of the saved state.
        for layer in range(self.num_layers):
            free = self._complement(layer)
            stored = super().basis(layer) if free is None else free
            if f"{prefix}complement_{layer}" in state_dict:
                self._store(layer, basis=None, free=stored)
            elif f"{prefix}basis_{layer}" in state_dict:
                self._store(layer, basis=stored, free=None)
        super()._load_from_state_dict(state_dict, prefix, *args)
