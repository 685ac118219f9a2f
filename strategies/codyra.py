"""CoDyRA on the image tower: adapters whose ranks have weights, and lose those that stay near zero.

Every rank of an adapter has a trained weight. In the first half of an experience all train freely; in the
second half a threshold, which rises step by step, pulls the weights of the ranks towards zero after every
step of the optimizer, so that only ranks that the loss needs stay. At the end they are merged, and the next
experience starts with all ranks anew.

Source: CoDyRA, https://arxiv.org/abs/2412.01004, and its released code,
https://github.com/Artificer-AI-Lab/CoDyRA, both for image and text towers of CLIP.

=============================================  ============================================================
paper                                          here
=============================================  ============================================================
``ΔW = B diag(ω) A``, ω normal, B = 0          ``RankedLinear``
``ω ← sign(ω) max(|ω| - κ, 0)``                ``proximal``, in ``after_step``
dense phase, then κ from 0 to ``κ_max``        ``CoDyRA.kappa``: 50 values over the second half
prune and merge                                ``AdaptedLinear.merge``: a weight of zero adds nothing
=============================================  ============================================================

Departures:

* Carried over from CLIP to class-incremental learning with a vision transformer: no text tower, and a linear
  head for each experience, trained by the cross-entropy over its own classes. No paper prints a number for
  that.
* ``threshold: prox`` is the paper's operator. The released code first shrinks a weight and then sets it to
  zero if what is left is below κ: it removes every weight below 2 κ. ``threshold: code`` does the same.
* The dense phase is half of the steps of an experience, as 250 of 500 in the released code.
* Nothing else is kept of an experience; the released code also stores the merged factors, which nothing uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import TrainingData
from cl_bench.network.adapters import AdaptedLinear
from cl_bench.network.backbones import Backbone

_LEVELS = 50  # values that the threshold takes


def proximal(weights: Tensor, kappa: float, threshold: Literal["prox", "code"] = "prox") -> Tensor:
    """Return weights (r,) moved towards zero by ``kappa``, and zero where they would pass it.

    >>> weights = torch.tensor([-3.0, -1.5, 0.5, 2.0])
    >>> proximal(weights, 1.0), proximal(weights, 1.0, "code")
    (tensor([-2.0000, -0.5000,  0.0000,  1.0000]), tensor([-2.,  0.,  0.,  1.]))
    """
    shrunk = weights.sign() * (weights.abs() - kappa).clamp(min=0)
    return shrunk if threshold == "prox" else torch.where(shrunk.abs() < kappa, 0.0, shrunk)


class RankedLinear(AdaptedLinear):
    """An adapted layer with a trained weight for each rank of its adapters.

    Args:
        linear: The layer to adapt; its weight and bias are frozen and shared, not copied.
        rows: Rows of the weight that each adapter adds to, by the adapter's name.
        rank: Rank of every adapter.
        scale: Factor of every adapter.

    Attributes:
        importance: Weights of the ranks, (r,) of each adapter.
    """

    def __init__(self, linear: nn.Linear, rows: Mapping[str, slice], rank: int, scale: float = 1.0) -> None:
        super().__init__(linear, rows, rank, scale)
        self.importance = nn.ParameterDict({name: nn.Parameter(self.weight.new_ones(rank)) for name in rows})

    @torch.no_grad()
    def reset(self) -> None:
        """Draw every adapter and its weights again, in place."""
        super().reset()
        for weights in self.importance.values():
            weights.normal_()

    def addend(self, name: str) -> tuple[Tensor, Tensor, float]:
        """Return ``A`` (r, n), ``s B diag(ω)`` (m, r), and 1."""
        adapter = self.adapter(name)
        return adapter.A, adapter.scale * adapter.B * self.importance[name], 1.0


class CoDyRA(LowRankStrategy):
    """Adapters that keep the ranks whose weights survive a rising threshold.

    Args:
        backbone: Pre-trained vision transformer.
        targets: Projections that carry an adapter.
        rank: Ranks of an adapter at the start of an experience.
        kappa_max: Highest threshold; what counts is its size against the learning rate.
        threshold: Operator on the weights: ``prox`` as in the paper, or ``code`` as released.
        kwargs: Settings of every strategy with adapters.

    Attributes:
        steps: Steps taken in this experience.
    """

    name = "CoDyRA"
    layer_class = RankedLinear
    layers: list[RankedLinear]  # type: ignore[assignment]

    def __init__(
        self,
        backbone: Backbone,
        *,
        targets: Sequence[str] = ("q", "k", "v", "proj", "fc1", "fc2"),
        rank: int = 16,
        kappa_max: float = 5e-3,
        threshold: Literal["prox", "code"] = "prox",
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, targets=targets, rank=rank, **kwargs)
        self.variant = "image tower"
        self.kappa_max = kappa_max
        self.threshold = threshold
        self.steps = 0  # a plain number: to read one on the device would wait for it in every step

    def before_training(self, data: TrainingData) -> None:
        """Count the steps anew."""
        self.steps = 0

    def after_step(self) -> None:
        """Shrink the weights of all ranks by the threshold of this step."""
        self.steps += 1
        whole = int(self.trainer.num_training_batches) * (self.trainer.max_epochs or 0)
        kappa = self.kappa(self.steps, whole)
        if kappa > 0:
            for layer in self.layers:
                for weights in layer.importance.values():
                    weights.copy_(proximal(weights, kappa, self.threshold))

    def kappa(self, step: int, whole: int) -> float:
        """Return the threshold after ``step``, from 1, of the ``whole`` number of steps of an experience."""
        dense = whole // 2
        level = _LEVELS * (step - dense - 1) // max(whole - dense, 1)
        return self.kappa_max * min(max(level, 0), _LEVELS - 1) / (_LEVELS - 1)

    def get_extra_state(self) -> int:
        """Return the number of steps, for a checkpoint."""
        return self.steps

    def set_extra_state(self, state: int) -> None:
        """Restore the number of steps."""
        self.steps = state
