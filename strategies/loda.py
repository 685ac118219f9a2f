"""LoDA: one branch for directions that old and new inputs share, one for directions of the new inputs only.

Before an experience, the second moment of its inputs is compared with the sum of all older ones. The rows of
the *general* down-projection are the strongest directions of both together; those of the *isolated* one have
much energy in the new inputs for little in the old. Both are frozen and their up-projections trained, in
pairs of steps that look for gradients on which two halves of the classes agree. At the end, the general
branch is recalibrated, direction by direction, to what it may change for old inputs, and both are merged.

Source: LoDA, ICML 2026, https://arxiv.org/abs/2603.00191, and its released code.

==================================  =====================================================================
paper                               here
==================================  =====================================================================
``S_t``, ``S_old`` (sums)           ``second_moments``, ``old_moments``
``U_G``: top r of S_t + S_old       ``leading_directions``, rows of the general ``A`` times 1/√3 (code)
``U_I``: S_t u = λ S_old u          ``generalised_directions``, rows of the isolated ``A`` times 1/√3 (code)
gradient-aligned optimisation, ρ    ``training_step``, ``looking_ahead``, ``radius``
``Λ = γ G_new (G_old + γ G_new)⁻¹`` ``recalibration``, G = A S Aᵀ; the code takes its diagonal, 1 - η
CosFace over the new classes        ``loss``: ``logit_scale``, ``margin``
==================================  =====================================================================

Departures:

* The alignment of gradients looks ahead down the gradient of one half of the classes, as the code does; the
  paper's wording suggests a step up. A batch of a single class takes an ordinary step, as in the code.
* Parameters are put back before the optimizer moves them, not after, so they return bit for bit; weight decay
  then acts on them where they are.
* ``general_weight`` and ``isolated_weight`` are the code's 0.5 and 1, both of which it halves.
* ``recalibration: diag`` is the code's, ``full`` the paper's closed form.
* ``count_merged``: the code adds the moments of a finished experience to the old ones twice, before and after
  merging. That is the default here, since the published numbers come from it.
* The old second moment is regularised relative to its size before it is decomposed; the code does so by
  absolute numbers, and only if the decomposition fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import Promises, TrainingData
from cl_bench.data.experience import Batch
from cl_bench.maths.losses import cosface
from cl_bench.maths.subspace import generalised_directions, leading_directions
from cl_bench.measure.moments import second_moments
from cl_bench.network.adapters import LowRank
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import GrowingCosine

Recalibration = Literal["diag", "full", "none"]
"""How a trained product is scaled before merging: each direction separately, all together, or not at all."""


class LoDA(LowRankStrategy):
    """General and isolated branches on the fused queries, keys and values of every block.

    A training step costs two steps of another method, since gradients are aligned in both directions.

    Args:
        backbone: Pre-trained vision transformer.
        rank: Rank of each branch.
        general_weight: Factor of the general branch.
        isolated_weight: Factor of the isolated branch.
        logit_scale: Factor of the cosines of the head.
        margin: Cosine that the own class gives up during training.
        gradient_alignment: Whether steps are taken in pairs over two halves of the classes of a batch.
        radius: Length of the look-ahead in each adapter tensor.
        recalibration: How the general branch is scaled before it is merged: diag, full or none.
        gamma: Weight of a change missed for new inputs against a change made to old inputs.
        count_merged: Whether a finished experience enters the old moments once more after merging.
        kwargs: Settings of every strategy with adapters.
    """

    name = "LoDA"
    head: GrowingCosine
    old_moments: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        rank: int = 32,
        general_weight: float = 0.25,
        isolated_weight: float = 0.5,
        logit_scale: float = 20.0,
        margin: float = 0.0,
        gradient_alignment: bool = True,
        radius: float = 0.3,
        recalibration: Recalibration = "diag",
        gamma: float = 3.0,
        count_merged: bool = True,
        **kwargs: Any,
    ) -> None:
        branches = {"general": "qkv", "isolated": "qkv"}
        super().__init__(backbone, targets=branches, rank=rank, scale=1.0, **kwargs)
        self.head = GrowingCosine(backbone.feature_dim)
        self.logit_scale = logit_scale
        self.margin = margin
        self.radius = radius
        self.recalibration = recalibration
        self.gamma = gamma
        self.count_merged = count_merged
        self.automatic_optimization = not gradient_alignment
        if recalibration != "none":  # it changes the general branch on purpose
            self.promises = Promises(merge_within=None)
        for general, isolated in self._branches():
            general.scale, isolated.scale = general_weight, isolated_weight
        width = self.input_width
        self.register_buffer("old_moments", torch.zeros(len(self.layers), width, width, dtype=torch.float64))

    def renew(self) -> None:
        """Start both branches; the first experience has only the general one, and trains its rows."""
        super().renew()
        first = self.experience.is_first
        for general, isolated in self._branches():
            general.A.requires_grad_(first)
            isolated.A.requires_grad_(False)
            isolated.B.requires_grad_(not first)

    def before_training(self, data: TrainingData) -> None:
        """Choose the rows of every A; dividing by √3 gives them the size of a fresh linear layer."""
        new = self._moments(data)
        shared = leading_directions(new + self.old_moments, self.rank)  # U_G
        for (general, _), directions in zip(self._branches(), shared, strict=True):
            general.A.copy_(directions.mT / math.sqrt(3))
        if not self.experience.is_first:
            own = generalised_directions(new, self.old_moments, self.rank)  # U_I
            for (_, isolated), directions in zip(self._branches(), own, strict=True):
                isolated.A.copy_(directions.mT / math.sqrt(3))

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the CosFace loss over the classes of this experience."""
        cosines, first = self.head.current(features), self.experience.classes.start
        return cosface(cosines, labels, first, scale=self.logit_scale, margin=self.margin)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch; with gradient alignment, take both of its steps."""
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        halves = self.class_halves(batch)
        if halves is None:
            loss = self._step(batch)
        else:
            length = self.radius * self.agreed(torch.rand(())).item()  # ρ u, u uniform in [0, 1)
            one, other = halves
            loss = (self._step(other, one, length) + self._step(one, other, length)) / 2
        self.log_loss(loss, len(batch[1]))
        return loss

    def class_halves(self, batch: Batch) -> tuple[Batch, Batch] | None:
        """Split a batch, images (B, …) and labels (B,), by a random half of its classes.

        It draws from torch's CPU generator, and returns None if the batch has a single class. All processes
        of a run split the whole batch by the same classes, so a half may be empty on one of them.
        """
        images, labels = batch
        classes = self.whole_batch(labels).unique()
        if len(classes) < 2:
            return None
        places = self.agreed(torch.randperm(len(classes)))
        chosen = classes[places[: len(classes) // 2].to(classes.device)]
        first = torch.isin(labels, chosen)
        return (images[first], labels[first]), (images[~first], labels[~first])

    def on_train_epoch_end(self) -> None:
        """Step the schedule, which Lightning does not do under manual optimization."""
        schedulers = self.lr_schedulers()
        if not self.automatic_optimization and schedulers is not None:
            for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
                scheduler.step()  # type: ignore[call-arg]

    def after_training(self, data: TrainingData) -> None:
        """Recalibrate the general branch, merge both, and add this experience to the old ones."""
        new = self._moments(data)
        if not self.experience.is_first:
            for (general, _), old, own in zip(self._branches(), self.old_moments, new, strict=True):
                scaling = recalibration(general.A, old, own, self.gamma, self.recalibration)  # Λ
                general.B.copy_(general.B @ scaling.to(general.B))
        super().after_training(data)
        self.old_moments += new
        if self.count_merged:
            self.old_moments += self._moments(data)

    def _branches(self) -> Iterator[tuple[LowRank, LowRank]]:
        return ((layer.adapter("general"), layer.adapter("isolated")) for layer in self.layers)

    def _moments(self, data: TrainingData) -> Tensor:
        return second_moments(self.features, self.layers, data.augmented())

    def _step(self, batch: Batch, ahead: Batch | None = None, length: float = 0.0) -> Tensor:
        """Take one step on ``batch``, with the gradient found where a step on ``ahead`` would lead."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        with nullcontext() if ahead is None else self._looking_ahead(ahead, length):
            loss = self.batch_loss(batch)
            self.manual_backward(loss)
        clip, algorithm = self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm
        self.clip_gradients(optimizer.optimizer, clip, algorithm)
        optimizer.step()
        torch.clear_autocast_cache()  # it may hold copies of parameters as they were before the step
        return loss.detach()

    def _looking_ahead(self, batch: Batch, length: float) -> Any:
        tensors = [p for layer in self.layers for p in layer.adapters.parameters() if p.requires_grad]
        gradients = self.summed(torch.autograd.grad(self.batch_loss(batch), tensors))
        return looking_ahead(tensors, gradients, length)


@contextmanager
def looking_ahead(tensors: Sequence[Tensor], gradients: Sequence[Tensor], length: float) -> Iterator[None]:
    """Move every tensor by ``length`` down its gradient inside the context, and back bit for bit afterwards.

    A gradient taken there makes, to first order, the inner product of both gradients larger: what is learnt
    for some classes then serves the others too. A tensor whose gradient is zero stays.

    Source: gradient-aligned optimisation in LoDA, https://arxiv.org/abs/2603.00191.

    >>> weight = torch.tensor([1.0, 1.0])
    >>> with looking_ahead([weight], [torch.tensor([3.0, 4.0])], length=1.0):
    ...     print(weight)
    tensor([0.4000, 0.2000])
    >>> weight
    tensor([1., 1.])
    """
    before = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.sub_(length * gradient / (gradient.norm() + 1e-12))
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)


def recalibration(
    down: Tensor, old: Tensor, new: Tensor, gamma: float, kind: Recalibration = "full"
) -> Tensor:
    """Return the scaling Λ (r, r) of a product ``B Λ A`` with the down-projection ``A`` (r, n), in float64.

    With ``G = A S Aᵀ`` for the second moments of old and new inputs,

        Λ = g G_new (G_old + g G_new)⁻¹,    g the weight gamma,

    minimises ‖B Λ A X_oldᵀ‖² + g ‖B (Λ - I) A X_newᵀ‖² for any ``B``. The diagonal form does so for each
    direction as if there were no others; its entries lie in [0, 1].

    Source: LoDA, https://arxiv.org/abs/2603.00191: the full form is the paper's, the diagonal its code's.

    Args:
        down: Down-projection ``A``.
        old: Uncentred second moment (n, n) of old inputs, on the scale of ``new``.
        new: Uncentred second moment (n, n) of the new inputs.
        gamma: Weight of a change missed for new inputs against a change made to old inputs.
        kind: Which form.

    >>> down, old, new = torch.eye(2), torch.diag(torch.tensor([3.0, 0.0])), torch.eye(2)
    >>> recalibration(down, old, new, gamma=1.0).diagonal()
    tensor([0.2500, 1.0000], dtype=torch.float64)
    """
    rows = down.double()
    of_old = rows @ old.double() @ rows.mT
    of_new = gamma * (rows @ new.double() @ rows.mT)
    match kind:
        case "diag":
            return torch.diag(of_new.diagonal() / (of_old + of_new).diagonal())
        case "full":
            scaling: Tensor = torch.linalg.solve(of_old + of_new, of_new, left=False)
            return scaling
        case "none":
            return torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
