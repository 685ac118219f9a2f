"""A strategy with low-rank adapters: what the methods of the LoRA family have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from cl_bench.contracts.strategy import Strategy, TrainingData
from cl_bench.data.experience import Experience
from cl_bench.maths.memory import GPM
from cl_bench.network.adapters import AdaptedLinear, LowRank, inject
from cl_bench.network.backbones import Backbone


class LowRankStrategy(Strategy):
    """A fresh adapter in every adapted projection for each experience, merged into the weight at its end.

    The cost does not grow with the number of experiences: older adapters are part of the weight. A method
    that keeps them adds adapters in ``expand`` with :meth:`~cl_bench.network.adapters.AdaptedLinear.add`, and
    overrides :meth:`renew` and :meth:`after_training`.

    Args:
        backbone: Pre-trained vision transformer.
        targets: Projections that carry an adapter, among q, k, v, qkv, proj, fc1, fc2; or the projection of
            each adapter by its name.
        rank: Rank of every adapter.
        scale: Factor of the low-rank product.
        blocks: Blocks that carry adapters, from 0; all of them if null.
        kwargs: Settings of every strategy.

    Attributes:
        layers: The adapted layers, in the order of the forward pass.
        memory: Protected input directions of each adapted projection, if the method keeps any.
    """

    layer_class: ClassVar[type[AdaptedLinear]] = AdaptedLinear
    memory: GPM | None

    def __init__(
        self,
        backbone: Backbone,
        *,
        targets: Sequence[str] | Mapping[str, str] = ("k", "v"),
        rank: int = 10,
        scale: float = 1.0,
        blocks: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        self.rank = rank
        self.memory = None
        self.layers = inject(backbone, targets, rank, scale, blocks, self.layer_class)

    def expand(self, experience: Experience) -> None:
        """Grow the head, and start a fresh adapter in every projection."""
        super().expand(experience)
        self.renew()

    def renew(self) -> None:
        """Start fresh adapters, in place."""
        for layer in self.layers:
            layer.reset()

    def after_training(self, data: TrainingData) -> None:
        """Add the trained products to the weights."""
        for layer in self.layers:
            layer.merge()

    def adapters(self) -> Iterator[tuple[int, LowRank]]:
        """Yield every adapter after the index of its projection, from 0.

        Adapters on the same rows of a layer, such as an older and a newer one, have the same projection.
        """
        first = 0
        for layer in self.layers:
            projections = layer.projections
            for name, rows in layer.rows.items():
                yield first + projections.index(rows), layer.adapter(name)
            first += len(projections)

    @property
    def layer_of(self) -> list[int]:
        """Index in :attr:`layers` of each adapted projection."""
        return [index for index, layer in enumerate(self.layers) for _ in layer.projections]

    @property
    def input_width(self) -> int:
        """Number of inputs of every adapted layer, for methods whose memory serves one width.

        Raises:
            ValueError: If adapted layers differ in it.
        """
        widths = sorted({layer.weight.shape[1] for layer in self.layers})
        if len(widths) != 1:
            raise ValueError(
                f"The adapted layers have inputs of {' and '.join(map(str, widths))} features, "
                "and one memory serves one width: leave out fc2, or adapt only that."
            )
        return widths[0]

    def of_projections(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Return the rows of each adapted projection, from a matrix (m, n) for each layer."""
        pairs = zip(self.layers, matrices, strict=True)
        return [matrix[rows] for layer, matrix in pairs for rows in layer.projections]


def memory_of(strategy: Strategy) -> GPM | None:
    """Return the memory of protected directions of any strategy, None if it keeps none."""
    memory = getattr(strategy, "memory", None)
    return memory if isinstance(memory, GPM) else None
