"""Memories of the input directions that a stream has used so far, for each adapted projection."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

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

Count = Callable[[Tensor, Sequence[int]], Sequence[int]]
"""How many new directions each basis takes, (L), a rule that the caller of :meth:`GPM.update` chooses.

It is called with the share of the energy that each free direction holds, (L, d) in float64, strongest first,
and with the number of directions that each basis protects, (L). What these hold is missing from the shares.
"""


def reaching(threshold: float) -> Count:
    """Take as few directions as bring the protected share of the energy to ``threshold``, in [0, 1].

    Source: GPM, https://arxiv.org/abs/2103.09762, equations 5 and 9.
    """
    return lambda shares, held: directions_needed(shares, threshold).tolist()


def below_first(threshold: float) -> Count:
    """As :func:`reaching`, but an empty basis takes one direction fewer, and at least one.

    Source: the released code of InfLoRA, https://arxiv.org/abs/2404.00228, in the first experience.
    """

    def count(shares: Tensor, held: Sequence[int]) -> list[int]:
        needed = directions_needed(shares, threshold).tolist()
        return [new if old else max(new - 1, 1) for new, old in zip(needed, held, strict=True)]

    return count


def at_most(most: int, count: Count) -> Count:
    """Limit what ``count`` takes to ``most`` directions for each basis, and warn if it took more."""

    def limited(shares: Tensor, held: Sequence[int]) -> list[int]:
        wanted = count(shares, held)
        for number, new in enumerate(wanted):
            if new > most:
                warnings.warn(
                    f"Basis {number} needs {new} new directions to hold enough energy, and only {most} are "
                    "known: keep more of them, or lower the threshold.",
                    stacklevel=3,
                )
        return [min(new, most) for new in wanted]

    return limited


class GPM(nn.Module):
    """Gradient projection memory: for each adapted projection a basis of the inputs met so far.

    Projections with equal inputs, such as queries, keys and values of one layer, share a basis. Methods that
    take a ``projection`` take its index among the adapted projections, and matrices come one for each basis.
    Each basis is a buffer, which grows.

    Source: GPM, https://arxiv.org/abs/2103.09762. There the matrix of sampled inputs is decomposed; the
    second moment has the same directions and energies, and its size does not grow with the samples.

    Args:
        projections: Number of the basis of each adapted projection, counted from 0; or the number of
            projections, if each has a basis of its own.
        dim: Width of every input, ``d``.
        energy: What a direction's share of the energy is measured on.
        dtype: Type in which directions are stored; that of the moments they come from if None.

    >>> memory = GPM(1, dim=3)
    >>> memory.update(torch.diag(torch.tensor([8.0, 1.0, 1.0])).expand(1, 3, 3), reaching(0.8))
    >>> memory.dims, memory.right_residual(torch.ones(1, 3), projection=0)
    ([1], tensor([[0., 1., 1.]]))
    >>> memory.update(torch.diag(torch.tensor([1.0, 1.0, 8.0])).expand(1, 3, 3), reaching(0.9))
    >>> memory.dims, memory.right_residual(torch.ones(1, 3), projection=0)
    ([2], tensor([[0., 1., 0.]]))
    >>> GPM([0, 0, 1], dim=3).dims  # the first two projections share a basis
    [0, 0, 0]
    """

    def __init__(
        self,
        projections: int | Sequence[int],
        dim: int,
        energy: Energy = "features",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.projections = list(range(projections) if isinstance(projections, int) else projections)
        self.num_bases = max(self.projections) + 1
        self.dim = dim
        self.energy = energy
        for number in range(self.num_bases):
            self.register_buffer(f"basis_{number}", torch.zeros(dim, 0))

    @property
    def dims(self) -> list[int]:
        """Dimensions that are protected, for each projection."""
        held = self._held()
        return [held[number] for number in self.projections]

    def basis(self, projection: int) -> Tensor:
        """Return the basis (d, k) of what is protected for ``projection``."""
        return self._basis(self.projections[projection])

    def first_with(self, number: int) -> int:
        """Return the first projection that uses basis ``number``."""
        return self.projections.index(number)

    def residual(self, x: Tensor, projection: int) -> Tensor:
        """Remove from the columns of ``x`` (d, n) what is protected for ``projection``; the type stays."""
        return self._residual(x, self.projections[projection])

    def right_residual(self, x: Tensor, projection: int) -> Tensor:
        """Remove from the rows of ``x`` (m, d) what is protected for ``projection``; the type stays."""
        return self.residual(x.mT, projection).mT

    @property
    def most_bytes(self) -> int:
        """Bytes of a memory that is as large as it can become."""
        return self.num_bases * self.dim * self._most_stored * (self.dtype or torch.float64).itemsize

    @torch.no_grad()
    def replace(self, projection: int, basis: Tensor) -> None:
        """Protect the span of ``basis`` (d, k), orthonormal, and nothing else; the memory keeps a copy.

        Args:
            projection: Whose basis it is, and that of all projections that share it.
            basis: Orthonormal columns, in any number up to d.

        Raises:
            ValueError: If the basis has another width.
        """
        if basis.ndim != 2 or basis.shape[0] != self.dim:
            raise ValueError(
                f"A basis of shape {tuple(basis.shape)} does not fit inputs of width {self.dim}: "
                f"give orthonormal columns ({self.dim}, k)."
            )
        self._store(self.projections[projection], basis.to(self.dtype or basis.dtype, copy=True))

    def clear(self) -> None:
        """Protect nothing.

        >>> memory = GPM(1, dim=2)
        >>> memory.replace(0, torch.tensor([[1.0], [0.0]]))
        >>> memory.clear()
        >>> memory.dims
        [0]
        """
        for number in range(self.num_bases):
            self._store(number, self._basis(number)[:, :0].clone())

    @torch.no_grad()
    def update(self, moments: Tensor, count: Count) -> None:
        """Protect, in each basis, the strongest free directions, as many as ``count`` returns.

        What is protected already stays as it is, and counts with what it holds of these moments. The new
        directions are the strongest eigenvectors of ``P M P``, where ``P`` projects onto what is free and
        ``M`` is the second moment, or its square for the energy of the covariance.

        Source: GPM, https://arxiv.org/abs/2103.09762, equations 5, 8 and 9.

        Args:
            moments: Second moments (L, d, d) of the inputs of the experience just learnt, one for each basis.
            count: How many new directions each basis takes.

        Raises:
            ValueError: If the moments do not fit, are zero or not finite.
        """
        self._require_width(moments)
        held = self._held()
        shares, directions = self._free_spectrum(of_unit_energy(moments, self.energy))
        for number, (old, new) in enumerate(zip(held, count(shares, held), strict=True)):
            if new > 0:
                free = directions[number, :, : self.dim - old].to(self.dtype or moments.dtype)
                self._protect(number, free[:, :new], rest=free[:, new:])

    @torch.no_grad()
    def free_directions(self, x: Tensor, rank: int, short: Literal["refuse", "zeros"] = "refuse") -> Tensor:
        """Return the strongest free directions of ``x`` for each projection, (P, d, rank), strongest first.

        They are left singular vectors of ``P x``, where ``P`` projects onto what is free. If ``P x`` has
        fewer than ``rank``, other free directions complete them.

        Source: with second moments as ``x``, the down-projections of InfLoRA,
        https://arxiv.org/abs/2404.00228; with transposed gradients, those of KeepLoRA,
        https://arxiv.org/abs/2601.19659.

        Args:
            x: One matrix (d, n) for each basis, (L, d, n).
            rank: Number of directions.
            short: What to do with a basis that leaves fewer than ``rank`` dimensions free: refuse it, since
                an adapter that shrank silently would go unnoticed, or give zeros instead, with a warning.

        Raises:
            ValueError: If a basis is refused; or if a matrix does not fit, is zero or not finite.
        """
        require_rank(rank, self.dim)
        self._require_width(x)
        free = [self.dim - held for held in self._held()]
        if min(free) < rank:
            number = next(number for number, room in enumerate(free) if room < rank)
            left = f"{free[number]} of {self.dim} dimensions"
            message = f"Basis {number} leaves {left} free, fewer than the rank {rank}"
            if short == "refuse":
                raise ValueError(
                    f"{message}: lower the rank, or the energy threshold so that less is protected."
                )
            warnings.warn(f"{message}: its adapters learn only in those.", stacklevel=2)
        wide = x.double()
        gram = of_unit_energy(wide @ wide.mT, "features")
        found = self._free_spectrum(gram)[1][..., :rank].to(x.dtype, copy=True)
        for number, room in enumerate(free):
            found[number, :, room:] = 0
        return found[self.projections]

    # What a form of storage decides

    def _held(self) -> list[int]:
        """Return the dimensions that each basis protects."""
        return [self._basis(number).shape[1] for number in range(self.num_bases)]

    def _basis(self, number: int) -> Tensor:
        return self.get_buffer(f"basis_{number}")

    def _residual(self, x: Tensor, number: int) -> Tensor:
        basis = self._basis(number)
        if basis.shape[1] == self.dim:  # subtracting would leave rounding errors, and not zero
            return torch.zeros_like(x)
        return residual(x, basis.to(x.dtype))

    @property
    def _most_stored(self) -> int:
        """Directions that are stored for a basis at most."""
        return self.dim

    def _store(self, number: int, basis: Tensor) -> None:
        self._buffers[f"basis_{number}"] = basis

    def _protect(self, number: int, new: Tensor, rest: Tensor) -> None:
        """Add the directions ``new`` (d, q) to a basis; ``rest`` spans what then is still free."""
        self._store(number, torch.cat([self._basis(number).to(new.dtype), new], dim=1))

    def _projector(self, number: int) -> Tensor:
        """Return the projector (d, d) onto what a basis protects, float64."""
        basis = self._basis(number).double()
        return basis @ basis.mT

    def _free_spectrum(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues (L, d) and eigenvectors (L, d, d) of ``P M P``, free directions first.

        ``M`` has trace one. Subtracting ``V V^T`` gives the protected directions the eigenvalue -1, so no
        eigenvector mixes them with free ones that have no energy either. One call decomposes all matrices.
        """
        shifted = []
        for number in range(self.num_bases):
            left = self._residual(whole[number], number)
            shifted.append(self._residual(left.mT, number).mT - self._projector(number))
        return spectrum(torch.stack(shifted))

    def _require_width(self, x: Tensor) -> None:
        if x.ndim != 3 or x.shape[:2] != (self.num_bases, self.dim):
            raise ValueError(
                f"Matrices of shape {tuple(x.shape)} do not fit a memory of {self.num_bases} bases of width "
                f"{self.dim}: stack one matrix of {self.dim} rows for each basis."
            )


class DualGPM(GPM):
    """A memory that stores whichever is smaller: a basis of what is protected, or of what is still free.

    It answers as :class:`GPM` does and stores at most d/2 columns for a basis, in a buffer that is named
    after the form: ``basis`` or ``complement``.

    Source: InfLoRA, https://arxiv.org/abs/2404.00228. If the first experience takes half of the dimensions
    or more, the released code keeps its directions and later takes them for the free ones; here they stay
    protected.

    Args:
        projections: Number of the basis of each adapted projection, or the number of projections.
        dim: Width of every input, ``d``.
        energy: What a direction's share of the energy is measured on.
        dtype: Type in which directions are stored; that of the moments they come from if None.

    >>> memory = DualGPM(1, dim=3)
    >>> memory.update(torch.diag(torch.tensor([8.0, 4.0, 1.0])).expand(1, 3, 3), reaching(0.9))
    >>> memory.dims, memory.right_residual(torch.ones(1, 3), projection=0)
    ([2], tensor([[0., 0., 1.]]))
    >>> {name: tuple(stored.shape) for name, stored in memory.state_dict().items()}
    {'complement_0': (3, 1)}
    """

    def __init__(
        self,
        projections: int | Sequence[int],
        dim: int,
        energy: Energy = "features",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(projections, dim, energy, dtype)
        for number in range(self.num_bases):
            self.register_buffer(f"complement_{number}", None)

    def _held(self) -> list[int]:
        found = []
        for number in range(self.num_bases):
            free = self._complement(number)
            found.append(super()._basis(number).shape[1] if free is None else self.dim - free.shape[1])
        return found

    def _basis(self, number: int) -> Tensor:
        free = self._complement(number)
        return super()._basis(number) if free is None else complement(free)

    def _residual(self, x: Tensor, number: int) -> Tensor:
        free = self._complement(number)
        if free is None:
            return super()._residual(x, number)
        free = free.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return free @ (free.mT @ x)

    @property
    def _most_stored(self) -> int:
        return self.dim // 2

    def _store(self, number: int, basis: Tensor) -> None:
        self._choose(number, basis, complement(basis) if 2 * basis.shape[1] > self.dim else None)

    def _protect(self, number: int, new: Tensor, rest: Tensor) -> None:
        if 2 * rest.shape[1] >= self.dim:
            super()._protect(number, new, rest)
        else:
            # A view would keep the eigenvectors of all bases alive, and in checkpoints.
            self._choose(number, None, rest.clone())

    def _projector(self, number: int) -> Tensor:
        free = self._complement(number)
        if free is None:
            return super()._projector(number)
        # Columns in float32 are orthonormal up to 4e-7, far above the squared energy of a weak direction.
        exact: Tensor = torch.linalg.qr(free.double()).Q
        return torch.eye(self.dim, dtype=exact.dtype, device=exact.device) - exact @ exact.mT

    def _complement(self, number: int) -> Tensor | None:
        return self._buffers[f"complement_{number}"]

    def _choose(self, number: int, basis: Tensor | None, free: Tensor | None) -> None:
        """Store what is free if it is given, else the basis."""
        self._buffers[f"basis_{number}"] = basis if free is None else None
        self._buffers[f"complement_{number}"] = free
