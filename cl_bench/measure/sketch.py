"""A sketch of the inputs of layers, in less memory than their second moments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cl_bench.maths.memory import GPM
from cl_bench.measure.passes import InputStatistic, tokens_recorded
from cl_bench.network.adapters import AdaptedLinear
from cl_bench.processes.ranks import total


class InputSketch(InputStatistic):
    """A sketch, in ``rows`` vectors, of what the inputs of each layer have outside a memory.

    Between training steps it holds (rows, d) numbers for each layer instead of (d, d). A batch is stacked
    below the sketch, and the singular values of both together are shrunk until no more than ``rows`` are
    left. The energy that shrinking removes is known in total and added back evenly: energies inside and
    outside the memory are exact, directions beyond those of the sketch are not. A memory takes no more than
    these. In a run of several processes each keeps a sketch of its own images, and the result is their sum:
    energies are those of one process, directions need not be.

    Source: frequent directions, https://arxiv.org/abs/1501.01711.

    Args:
        layers: Layers with one number of inputs, ``d``.
        memory: What is protected in each of them.
        rows: Directions to keep; never more than d.
        every: Record every so many forward passes, the first included.
        most_tokens: Tokens to record of a batch, spread over images and places, and others of every batch.

    Attributes:
        sketch: ``Y`` (L, rows, d), so that ``Y^T Y`` is nearly ``P X^T X P`` of the inputs ``X``.
        inside: Energy of the inputs in the protected directions, (L,) in float64.
        outside: Their energy elsewhere, (L,) in float64.
        tokens: Number of tokens recorded of each layer, (L,).

    Raises:
        ValueError: If the layers differ in their number of inputs, the sketch has no row, or the memory
            measures the energy of the covariance, which a sketch does not know in total.

    >>> layer = nn.Linear(2, 3)
    >>> inputs = InputSketch([layer], GPM(1, dim=2), rows=1)
    >>> with inputs.recording():
    ...     _ = layer(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    >>> inputs.mean().round(decimals=4)
    tensor([[[5., 0.],
             [0., 0.]]], dtype=torch.float64)
    """

    sketch: Tensor
    inside: Tensor
    outside: Tensor
    tokens: Tensor

    def __init__(
        self,
        layers: Sequence[AdaptedLinear | nn.Linear],
        memory: GPM,
        rows: int = 64,
        every: int = 1,
        most_tokens: int = 256,
    ) -> None:
        super().__init__(layers, every)
        if rows < 1:
            raise ValueError(f"A sketch of {rows} rows holds nothing: give it at least one.")
        if memory.energy != "features":
            raise ValueError(
                "A sketch knows the total energy of features, but not that of their covariance: "
                "set energy to features, or estimate exact moments."
            )
        self._memory = (memory,)  # in a tuple, it does not become a part of this module
        self._projection = [memory.first_with(index) for index in range(len(layers))]
        self.rows = min(rows, self.width)
        self.most_tokens = most_tokens
        self.clear()

    def clear(self) -> None:
        """Forget every token."""
        super().clear()
        count, device = len(self.layers), self.layers[0].weight.device
        self.register_buffer("sketch", torch.zeros(count, self.rows, self.width, device=device))
        for name in ("inside", "outside"):
            self.register_buffer(name, torch.zeros(count, dtype=torch.float64, device=device))
        self.register_buffer("tokens", torch.zeros(count, dtype=torch.int64, device=device))

    def mean(self) -> Tensor:
        """Return an estimate of the second moments (L, d, d), in float64, whose energies are exact.

        Raises:
            ValueError: If no token was recorded.
        """
        tokens = tokens_recorded(self.tokens)
        kept = self.sketch.double()
        found = total(kept.mT @ kept)
        inside, outside = total(self.inside), total(self.outside)
        missing = (outside - found.diagonal(dim1=-2, dim2=-1).sum(-1)).clamp(min=0)
        for index, moment in enumerate(found):
            basis = self._memory[0].basis(self._projection[index]).double()
            held, free = basis.shape[1], self.width - basis.shape[1]
            protected = basis @ basis.mT
            moment += protected * (inside[index] / max(held, 1))
            moment += (torch.eye(self.width).to(protected) - protected) * (missing[index] / max(free, 1))
        return found / tokens[:, None, None]

    def take(self, index: int, tokens: Tensor) -> None:
        """Add the energies of tokens (N, d), and stack their part outside the memory below the sketch."""
        recorded = (self._passes[index] - 1) // self.every  # batches before this one
        tokens = tokens[_spread(len(tokens), self.most_tokens, recorded)].float()
        rest = self._memory[0].right_residual(tokens, self._projection[index])
        energy = rest.double().square().sum()
        self.inside[index] += (tokens.double().square().sum() - energy).clamp(min=0)
        self.outside[index] += energy
        self.tokens[index] += len(tokens)
        self._stack(index, rest)

    def include(self, share: Mapping[str, Tensor]) -> None:
        """Add energies, and stack the sketches."""
        if bool(self.tokens.any()):
            for index, rows in enumerate(share["sketch"]):
                self._stack(index, rows)
        else:
            self.sketch = share["sketch"].clone()
        for name in ("inside", "outside", "tokens"):
            setattr(self, name, getattr(self, name) + share[name])

    def _stack(self, index: int, rows: Tensor) -> None:
        """Stack rows (N, d) below the sketch of a layer and shrink both together."""
        stacked = torch.cat([self.sketch[index], rows]).double()
        values, vectors = torch.linalg.eigh(stacked @ stacked.mT)  # weakest first
        beyond = values[-self.rows - 1].clamp(min=0) if len(values) > self.rows else values.new_zeros(())
        values, vectors = values[-self.rows :], vectors[:, -self.rows :]
        shrunk = ((values - beyond).clamp(min=0) / values.clamp(min=torch.finfo(values.dtype).tiny)).sqrt()
        self.sketch[index] = (shrunk[:, None] * (vectors.mT @ stacked)).float()


def _spread(count: int, most: int, turn: int) -> list[int]:
    """Return at most ``most`` of ``count`` places, widely spaced, and out of step with any period.

    The places of a token repeat from image to image: a stride that divided their number would pick the same
    ones from every image. This stride shares no factor with the count, and is near its golden section. The
    places of each ``turn``, counted from 0, continue where those of the turn before end, so batches of equal
    size take every token of an image equally often, up to one.
    """
    if count <= most:
        return list(range(count))
    step = round(count * 0.618)
    while math.gcd(step, count) != 1:
        step += 1
    return [place * step % count for place in range(turn * most, (turn + 1) * most)]
