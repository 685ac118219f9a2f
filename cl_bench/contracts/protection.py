"""Training both factors of every adapter without changing what older experiences use."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor

from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import TrainingData
from cl_bench.maths.memory import GPM, at_most, reaching
from cl_bench.maths.rectification import Gauge, rectified
from cl_bench.maths.subspace import Energy, energy_threshold
from cl_bench.network.adapters import LowRank
from cl_bench.network.backbones import Backbone
from cl_bench.network.shielded import ShieldedLinear

RowSpace = Literal["safe", "free"]
"""Where the rows of a down-projection may lie: outside what is protected, or anywhere."""


class ProtectedStrategy(LowRankStrategy):
    """Adapters whose two factors train, and a memory of the input directions that they must not act on.

    A subclass fills :attr:`memory` at the end of an experience with :meth:`protect`, and edits gradients with
    :meth:`project_gradients`: the gradient of every ``A`` loses what lies in the protected directions. That
    is not enough to make the update of the weight safe, because ``B`` acts through the rows of ``A`` as they
    are. Two settings solve this:

    * ``row_space: safe`` clears the rows of ``A`` at the start and after every step, whatever the optimizer
      does with the gradient. The weight then changes in no protected direction, second-order terms included.
    * ``rectification`` replaces both gradients by those whose joint effect on the weight is nearest to the
      projected gradient of the weight itself, by :meth:`rectify_factors`. With a free row space a residue
      remains, and Adam, which scales each entry separately, makes it larger.

    Args:
        backbone: Pre-trained vision transformer.
        rectification: Whether both gradients are rectified, or only that of A is projected.
        row_space: ``safe`` keeps the rows of A outside the protected directions; ``free`` does not.
        gauge: Which factor carries what both could: a-first, b-first, half or minnorm.
        relative_damping: Added to the diagonals of the Gram matrices that rectification solves, in units of
            their means.
        threshold: Share of the energy of its inputs that the first experience protects.
        threshold_end: What the share rises to, linearly, by the end of the stream.
        energy: Whether shares are those of features or of their covariance, which needs far fewer directions.
        kwargs: Settings of every strategy with adapters.
    """

    layer_class = ShieldedLinear
    memory: GPM

    def __init__(
        self,
        backbone: Backbone,
        *,
        rectification: bool = False,
        row_space: RowSpace = "free",
        gauge: Gauge = "half",
        relative_damping: float = 1e-4,
        threshold: float = 0.95,
        threshold_end: float = 1.0,
        energy: Energy = "features",
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        # Every gradient is projected with the basis.
        self.promises = replace(self.promises, step_grows_with=(*self.promises.step_grows_with, "basis"))
        self.rectification = rectification
        self.row_space = row_space
        self.gauge = gauge
        self.relative_damping = relative_damping
        self.threshold = threshold
        self.threshold_end = threshold_end
        self.memory = GPM(self.layer_of, self.input_width, energy, dtype=torch.float32)

    def protect(self, moments: Tensor, most: int | None = None) -> None:
        """Add to the memory what this experience uses.

        Args:
            moments: Second moments (layers, n, n) of the inputs.
            most: Most directions of a layer, if no more are known.
        """
        at, of = self.experience.index, self.experience.num_experiences
        count = reaching(energy_threshold(at, of, self.threshold, self.threshold_end))
        self.memory.update(moments, count if most is None else at_most(most, count))

    def before_training(self, data: TrainingData) -> None:
        """Clear the rows of every A, or let the gradient of every B be that of a cleared A."""
        if self.row_space == "safe":
            self._require_room()
            self._clear_rows()
        else:
            self._shield()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Shield the layers again: a checkpoint holds only the memory."""
        if self.row_space == "free":
            self._shield()

    def after_step(self) -> None:
        """Clear the rows of every A of what the optimizer put there."""
        if self.row_space == "safe":
            self._clear_rows()

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Remove from the gradient of every A what lies in the protected directions."""
        self._clear((projection, _gradient(adapter.A)) for projection, adapter in self._trained())

    @torch.no_grad()
    def rectify_factors(self) -> None:
        """Replace the projected gradients of A and B by the closed form of all adapters of one shape."""
        for alike in self._trained_alike():
            found = rectified(
                torch.stack([adapter.A for adapter in alike]),
                torch.stack([adapter.B for adapter in alike]),
                torch.stack([_gradient(adapter.A) for adapter in alike]),
                torch.stack([_gradient(adapter.B) for adapter in alike]),
                scale=float(alike[0].scale),
                damping=self.relative_damping,
                gauge=self.gauge,
            )
            for adapter, X, Y in zip(alike, *found, strict=True):
                _gradient(adapter.A).copy_(X)
                _gradient(adapter.B).copy_(Y)

    def _shield(self) -> None:
        if self.rectification:
            for index, layer in enumerate(self.layers):
                assert isinstance(layer, ShieldedLinear)
                layer.shield(self.memory.basis(self.memory.first_with(index)))

    def _clear_rows(self) -> None:
        self._clear((projection, adapter.A) for projection, adapter in self.adapters())

    def _clear(self, rows: Iterable[tuple[int, Tensor]]) -> None:
        """Clear rows (r, n) of what is protected for their projection, in place; each basis is read once."""
        layer_of = self.layer_of
        for _, of_layer in groupby(rows, key=lambda one: layer_of[one[0]]):
            projections, parts = zip(*of_layer, strict=True)
            cleared = self.memory.right_residual(torch.cat(parts), projections[0])
            for part, own in zip(parts, cleared.split([len(part) for part in parts]), strict=True):
                part.copy_(own)

    def _trained(self) -> Iterator[tuple[int, LowRank]]:
        return ((index, one) for index, one in self.adapters() if one.A.grad is not None)

    def _trained_alike(self) -> Iterator[list[LowRank]]:
        def form(adapter: LowRank) -> tuple[Any, ...]:
            return *adapter.A.shape, *adapter.B.shape, adapter.scale

        for _, alike in groupby(sorted(map(itemgetter(1), self._trained()), key=form), key=form):
            yield list(alike)

    def _require_room(self) -> None:
        dims = self.memory.dims
        for index in range(len(self.layers)):
            free = self.memory.dim - dims[self.memory.first_with(index)]
            if free < self.rank:
                warnings.warn(
                    f"Layer {index} has {free} of {self.memory.dim} dimensions free, fewer than the rank "
                    f"{self.rank}: its adapters learn only in those. Lower threshold or threshold_end.",
                    stacklevel=2,
                )


def _gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return gradient
