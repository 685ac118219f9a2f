"""Subspaces of a layer's inputs: their bases, what lies outside them, and the memories that gather them.

A basis is a matrix ``V`` (d, k) with orthonormal columns. A second moment is uncentred, ``S = X^T X / N``
for inputs ``X`` (N, d): a unit vector ``u`` holds the energy ``u^T S u``, and the trace is the energy of all.
Only shares of the energy count, so the scale of a moment is arbitrary, and so is the sign of a direction.

Decisions are made in float64; what is returned or stored has the type of what was given. Mixed precision does
not reach the projections: bfloat16 would leave thousandths of what they remove.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

Energy = Literal["features", "covariance"]
"""What the share of a direction is measured on: the eigenvalues of ``S``, or those of ``S S``.

The first are squared singular values of the inputs, as in the papers. The second are squared singular values
of ``S`` itself, which the released code of InfLoRA decomposes; far fewer directions then meet a threshold.
"""

FirstCount = Literal["reaching", "below"]
"""How many directions a layer takes that has none yet: enough to reach the threshold, or all that stay below.

The first is the rule of the papers. The second takes one fewer, yet at least one; the released code of
InfLoRA does so in the first experience, and reaches the threshold in all later ones.
"""

_ROUNDING = 1e-12  # a share of the energy that eigenvalues in float64 cannot tell from zero
_JITTER = 1e-12  # of the mean eigenvalue, to begin with


def residual(x: Tensor, basis: Tensor) -> Tensor:
    """Remove from the columns of ``x`` (…, d, n) whatever lies in the span of ``basis`` (…, d, k).

    The projector (d, d) is never formed. Source: GPM, https://arxiv.org/abs/2103.09762, equation 8.

    >>> e0 = torch.tensor([[1.0], [0.0]])
    >>> residual(torch.tensor([[3.0], [4.0]]), e0).flatten()
    tensor([0., 4.])
    """
    with torch.autocast(x.device.type, enabled=False):
        return x - basis @ (basis.mT @ x)


def right_residual(x: Tensor, basis: Tensor) -> Tensor:
    """Remove from the rows of ``x`` (…, m, d) whatever lies in the span of ``basis`` (…, d, k).

    This is the one for weights (m, d), down-projections (r, d) and their gradients: the result maps the span
    to zero. Source: GPM, https://arxiv.org/abs/2103.09762, equation 6.

    >>> e0 = torch.tensor([[1.0], [0.0]])
    >>> right_residual(torch.tensor([[3.0, 4.0], [5.0, 6.0]]), e0)
    tensor([[0., 4.],
            [0., 6.]])
    """
    with torch.autocast(x.device.type, enabled=False):
        return x - (x @ basis) @ basis.mT


def orthonormal(columns: Tensor) -> Tensor:
    """Return an orthonormal basis (…, d, k) of the span of k independent ``columns`` (…, d, k).

    Raises:
        ValueError: If a column lies in the span of those before it.

    >>> orthonormal(torch.tensor([[2.0, 1.0], [0.0, 3.0], [0.0, 0.0]])).abs()
    tensor([[1., 0.],
            [0., 1.],
            [0., 0.]])
    """
    width, count = columns.shape[-2:]
    basis: Tensor
    basis, triangle = torch.linalg.qr(columns)
    heights = triangle.diagonal(dim1=-2, dim2=-1).abs()  # of each column above the span of those before it
    rounding = width * torch.finfo(columns.dtype).eps * columns.norm(dim=-2)
    if count > width or not bool((heights > rounding).all()):
        raise ValueError(
            f"{count} columns of length {width} are not linearly independent, or not finite: "
            "leave out those that the others span."
        )
    return basis


def complement(basis: Tensor) -> Tensor:
    """Return an orthonormal basis (d, d - k) of everything orthogonal to ``basis`` (d, k).

    >>> complement(torch.tensor([[1.0], [0.0], [0.0]])).abs()
    tensor([[0., 0.],
            [1., 0.],
            [0., 1.]])
    """
    everything: Tensor = torch.linalg.qr(basis, mode="complete").Q
    return everything[:, basis.shape[1] :].clone()


def leading_directions(moments: Tensor, rank: int) -> Tensor:
    """Return the ``rank`` strongest eigenvectors (…, d, rank) of moments (…, d, d), strongest first.

    Raises:
        ValueError: If the rank is not between 1 and d.

    >>> leading_directions(torch.diag(torch.tensor([1.0, 3.0, 2.0])), rank=2).abs()
    tensor([[0., 0.],
            [1., 0.],
            [0., 1.]])
    """
    _require_rank(rank, moments.shape[-1])
    return _spectrum(moments.double())[1][..., :rank].to(moments.dtype, copy=True)


def generalised_directions(new: Tensor, old: Tensor, rank: int) -> Tensor:
    """Return orthonormal directions (…, d, rank) with much energy in ``new`` for little in ``old``.

    They span the strongest solutions of ``S_new u = λ S_old u``. With the factor ``L L^T = S_old`` these are
    ``u = L^-T v`` for the strongest eigenvectors ``v`` of ``L^-1 S_new L^-T``. Each has the largest ratio of
    the two energies among all vectors conjugate to those before it, which does not make the ratio of the two
    traces over the span the largest.

    The diagonal of ``old`` is raised by 1e-12 of its mean, and by ten times as much until there is a factor.
    A direction in which no input has energy, as a normalisation layer may leave one, would otherwise have a
    ratio made of rounding, and often the largest. Moments in float32 round too coarsely to be safe from that.

    Source: the isolated directions of LoDA, https://arxiv.org/abs/2603.00191. The released code raises the
    diagonal only where the factorisation fails, and by absolute numbers, which depend on the scale.

    Args:
        new: Second moments (…, d, d) of the experience at hand, best in float64.
        old: Second moments (…, d, d) of the experiences before, best in float64.
        rank: Number of directions.

    Raises:
        ValueError: If the rank is not between 1 and d, or ``old`` is no second moment of inputs.

    >>> new, old = torch.diag(torch.tensor([4.0, 3.0, 1.0])), torch.diag(torch.tensor([8.0, 1.0, 1.0]))
    >>> generalised_directions(new, old, rank=1).abs().flatten()
    tensor([0., 1., 0.])
    """
    _require_rank(rank, new.shape[-1])
    factor = _cholesky_factor(old.double())
    half = torch.linalg.solve_triangular(factor, new.double(), upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    strongest = _spectrum(whitened)[1][..., :rank]
    solutions = torch.linalg.solve_triangular(factor.mT, strongest, upper=True)
    directions: Tensor = torch.linalg.qr(solutions).Q
    return directions.to(new.dtype)


def energy_shares(moments: Tensor, energy: Energy = "features") -> Tensor:
    """Return what each direction of moments (…, d, d) holds of the energy, (…, d), strongest first, float64.

    >>> moments = torch.diag(torch.tensor([1.0, 3.0]))
    >>> energy_shares(moments)
    tensor([0.7500, 0.2500], dtype=torch.float64)
    >>> energy_shares(moments, "covariance")
    tensor([0.9000, 0.1000], dtype=torch.float64)
    """
    return _spectrum(_of_unit_energy(moments, energy))[0]


def directions_needed(shares: Tensor, threshold: float) -> Tensor:
    """Return how few of the strongest directions it takes to hold ``threshold`` of the energy, (…), integers.

    Args:
        shares: Each direction's share of the energy (…, d), strongest first, float64. They may sum to less
            than one: what is missing counts as held already.
        threshold: Share of the energy to hold, in [0, 1].

    Raises:
        ValueError: If the threshold is no share.

    >>> directions_needed(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 0.8)
    tensor(2)
    >>> directions_needed(torch.tensor([0.1, 0.05, 0.0], dtype=torch.float64), 0.8)  # 0.85 is held already
    tensor(0)
    """
    if not 0 <= threshold <= 1:
        raise ValueError(
            f"An energy threshold of {threshold} is no share of the energy: choose one from 0 to 1."
        )
    # Summed from the weak end, so that small sums keep their digits.
    left = shares.flip(-1).cumsum(-1).flip(-1)  # what is not held before each direction is taken
    left = left.clamp(max=1)  # rounding may give some directions less than none
    return (left > 1 - threshold + _ROUNDING).sum(-1)


def energy_threshold(index: int, num_experiences: int, start: float, end: float = 1.0) -> float:
    """Return the energy threshold of experience ``index``: linear from ``start``, ending before ``end``.

    Source: the released code of InfLoRA, https://arxiv.org/abs/2404.00228.

    Args:
        index: Index of the experience, from 0.
        num_experiences: Number of experiences in the stream.
        start: Threshold of the first experience, in [0, 1].
        end: Threshold that an experience after the last would have, in [0, 1].

    Raises:
        ValueError: If there is no such experience.

    >>> [round(energy_threshold(index, 10, start=0.98), 3) for index in (0, 1, 9)]
    [0.98, 0.982, 0.998]
    """
    if not 0 <= index < num_experiences:
        raise ValueError(
            f"There is no experience {index} in a stream of {num_experiences}: "
            f"choose one from 0 to {num_experiences - 1}."
        )
    return start + (end - start) * index / num_experiences


def principal_subspace(weight: Tensor, threshold: float) -> Tensor:
    """Return the input directions (n, p) that hold ``threshold`` of the energy of ``weight`` (m, n).

    They are the first right singular vectors, as few as hold that share of the squared singular values.

    Source: KeepLoRA, https://arxiv.org/abs/2601.19659, whose weight is the transpose of PyTorch's.

    Args:
        weight: Weight of a linear layer.
        threshold: Share of the energy, in [0, 1].

    Raises:
        ValueError: If the threshold is no share, or the weight is zero or not finite.

    >>> principal_subspace(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]), threshold=0.8).abs().flatten()
    tensor([0., 1., 0.])
    """
    wide = weight.double()
    shares, directions = _spectrum(_of_unit_energy(wide.mT @ wide, "features"))
    return directions[:, : int(directions_needed(shares, threshold))].to(weight.dtype, copy=True)


def principal_output_subspace(weight: Tensor, threshold: float) -> Tensor:
    """Return the output directions (m, p) that hold ``threshold`` of the energy of ``weight`` (m, n).

    They are left singular vectors. The released code of KeepLoRA removes these from the inputs of its square
    weights, where the paper means :func:`principal_subspace`.

    >>> weight = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
    >>> principal_output_subspace(weight, threshold=0.8).abs().flatten()
    tensor([1., 0.])
    """
    return principal_subspace(weight.mT, threshold)


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
        shares, directions = self._free_spectrum(_of_unit_energy(moments, self.energy))
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
        _require_rank(rank, self.dim)
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
        gram = _of_unit_energy(wide @ wide.mT, "features")
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
        whole = _of_unit_energy(moments, self.energy)
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
        return _spectrum(torch.stack(shifted))

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


def _spectrum(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (…, d), none below zero, and eigenvectors (…, d, d), strongest first."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(-1).clamp(min=0), vectors.flip(-1)


def _of_unit_energy(moments: Tensor, energy: Energy) -> Tensor:
    """Return second moments (…, d, d), squared for the energy of the covariance, with trace one, float64."""
    wide = moments.double()
    trace = wide.diagonal(dim1=-2, dim2=-1).sum(-1)
    sound = (trace > 0) & wide.isfinite().all(-1).all(-1)
    if not bool(sound.all()):
        first = int((~sound).flatten().nonzero()[0])
        raise ValueError(
            f"Matrix {first} has no energy, or entries that are not finite: "
            "measure it on inputs that are finite and not all zero."
        )
    wide = wide / trace[..., None, None]
    return _of_unit_energy(wide @ wide, "features") if energy == "covariance" else wide


def _cholesky_factor(moments: Tensor) -> Tensor:
    """Return ``L`` (…, d, d), lower triangular: ``L L^T`` are the moments with a raised diagonal."""
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    if not bool((mean > 0).all() & moments.isfinite().all()):
        raise ValueError(
            "The older second moment is zero or not finite: ask for isolated directions after an experience."
        )
    identity = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    jitter = _JITTER * mean
    while bool((jitter < mean).all()):
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(moments + jitter[..., None, None] * identity)
        if not bool(failed.any()):
            return factor
        jitter = jitter.where(failed == 0, 10 * jitter)
    raise ValueError(
        "The older second moment has a large negative eigenvalue: give X^T X / N of some inputs X."
    )


def _require_rank(rank: int, width: int) -> None:
    if not 1 <= rank <= width:
        raise ValueError(
            f"No {rank} directions of {width} dimensions can be orthonormal: choose a rank from 1 to {width}."
        )
