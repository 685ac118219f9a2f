"""CL-LoRA: adapters that all experiences share in early blocks, and adapters of each experience in late ones.

A shared adapter has a fixed orthonormal down-projection, and its up-projection learns through the whole
stream; a step of distillation before every other step holds it near what it was, at an exit after the early
blocks. The adapters of an experience are scaled by learnt block weights. At test time an image passes under
the adapters of every experience, and each pass is compared with the class means that were measured under
them, so no task id is needed.

Source: CL-LoRA, CVPR 2025, https://arxiv.org/abs/2505.24816, and its released code
https://github.com/JiangpengHe/CL-LoRA, whose letters for the two projections are the reverse of these.

============================================  ======================================================
released code                                 here
============================================  ======================================================
shared, blocks 0 to 5: A fixed, B trained     ``shared``
specific, blocks 6 to 11: A_t, B_t trained    ``specific``, two new adapters in each block
every A starts with orthonormal rows          ``orthonormal``
block weights w_t, uniform in [0.5, 1.5]      ``scale`` of each specific adapter
CE over scaled cosines                        ``loss``, ``weight`` and their scale ``temper``, new each time
``mean_{i<t} |cos(w_i, w_t)|`` times 1e-4     ``overlap``, ``orthogonality``
soft CE at temperature 2, times 5             ``distillation``, ``distillation_weight``
row j of that gradient times 768 ‖b_j‖/Σ‖b‖   ``multipliers``, of the up-projection before
prototypes under each adapter set             ``head``, ``forward``
============================================  ======================================================

Departures:

* The logits of the step after distillation are computed after it. The released code computes them before and
  changes the weights in between, which current PyTorch refuses.
* The teacher is a constant, and gradients reach only the student; in the released code they also reach the
  classifier through the teacher.
* Block weights of keys, which have no adapter, do not exist; in the released code they enter the overlap.
* Multipliers come from the old up-projection, as in the code; the paper takes differences of gradients.
* A prototype is kept for each class under the adapters of its own experience, the only ones that are used.
* The overlap that is penalised is that of the block weights, as in the code; in the paper it is that of the
  adapters.

Both steps of a batch share one optimizer, as in the code, which has SGD. Adam rescales small gradients, so
under it the distillation has another weight than published, and features drift more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import Promises, TrainingData
from cl_bench.data.experience import Batch
from cl_bench.maths.losses import cosine_similarities, local_cross_entropy
from cl_bench.measure.means import class_means
from cl_bench.network.adapters import AdaptedLinear, LowRank
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import Prototypes


class CLLoRA(LowRankStrategy):
    """Shared adapters held by distillation, and specific adapters with block weights.

    The first half of the blocks has shared adapters, the other half specific ones. Evaluation takes a pass
    for every experience so far.

    Args:
        backbone: Pre-trained vision transformer of at least two blocks.
        orthogonality: Weight of the overlap between block weights of different experiences.
        distillation_weight: Weight of the distillation.
        kwargs: Settings of every strategy with adapters; the targets are q and v.

    Raises:
        ValueError: If the backbone has a single block.
    """

    name = "CL-LoRA"
    promises = Promises(
        start_within=None,  # features of the new adapters; logits of old classes stay
        state_grows_with=("experiences",),  # specific adapters
    )
    head: Prototypes

    def __init__(
        self,
        backbone: Backbone,
        *,
        orthogonality: float = 1e-4,
        distillation_weight: float = 5.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, targets=("q", "v"), **kwargs)
        if backbone.depth < 2:
            raise ValueError("CL-LoRA splits the blocks in two halves: choose a backbone of two or more.")
        self.orthogonality = orthogonality
        self.distillation_weight = distillation_weight
        self.head = Prototypes(backbone.feature_dim, "cosine")
        self.early = backbone.depth // 2
        self.shared, self.specific = self.layers[: self.early], self.layers[self.early :]
        self._thirds = dict(self.layers[0].rows)

    @torch.no_grad()
    def renew(self) -> None:
        """Add the specific adapters of the experience and a classifier, and remember the shared adapters."""
        index = self.experience.index
        if index == 0:
            super().renew()
            for adapter in self._shared():
                adapter.A.copy_(orthonormal(adapter.A)).requires_grad_(False)
        for layer in self.specific:
            layer.adapters.requires_grad_(False)
            for third, rows in self._thirds.items():
                name = _name(third, index)
                adapter = layer.adapter(name) if index == 0 else layer.add(name, rows, self.rank)
                adapter.A.copy_(orthonormal(adapter.A))
                adapter.scale = nn.Parameter(torch.empty(()).uniform_(0.5, 1.5))  # w_t
                adapter.requires_grad_(True)
            layer.rows = self._rows(index)
        for layer in self.shared if index else ():
            for third, rows in self._thirds.items():
                if index == 1:
                    layer.add(_name(third, "before"), rows, self.rank).requires_grad_(False)
                live, before = layer.adapter(third), layer.adapter(_name(third, "before"))
                before.A.copy_(live.A)
                before.B.copy_(live.B)
            layer.rows = dict(self._thirds)
        bound = self.backbone.feature_dim**-0.5
        classes = self.experience.num_classes
        self.weight = nn.Parameter(torch.empty(classes, self.backbone.feature_dim).uniform_(-bound, bound))
        self.temper = nn.Parameter(torch.ones(()))

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy over the classes of this experience, and the weighted overlap."""
        logits = self._logits(features)
        return local_cross_entropy(logits, labels, self.experience.classes.start) + (
            self.orthogonality * self.overlap() if self.experience.index else 0.0
        )

    def overlap(self) -> Tensor:
        """Return the mean absolute cosine between the block weights of each older experience and w_t."""
        old = torch.stack([self.block_weights(index) for index in range(self.experience.index)])
        return F.cosine_similarity(old, self.block_weights(self.experience.index)[None]).abs().mean()

    def block_weights(self, experience: int) -> Tensor:
        """Return w of an experience: a weight for each specific adapter."""
        found = [layer.adapter(_name(t, experience)) for layer in self.specific for t in self._thirds]
        return torch.stack([torch.as_tensor(adapter.scale) for adapter in found])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return what distillation moves as a group of its own: one kernel steps a whole group, or none."""
        distilled = self._distilled()
        held = set(map(id, distilled))
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in held]
        return [{"params": distilled}, {"params": rest}]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Take the step of distillation, then return the loss of the batch."""
        if not self.experience.is_first:
            if self.trainer.accumulate_grad_batches > 1:
                raise ValueError("CL-LoRA steps twice in every batch: leave out accumulate_grad_batches.")
            self._distil(batch[0])
        return super().training_step(batch, batch_idx)

    def distillation(self, images: Tensor) -> Tensor:
        """Return the sum over images (B, 3, H, W) of the cross-entropy to the logits of the teacher."""
        with torch.no_grad():
            teacher = self._logits(self._exit(images, self._rows("before"))) / 2
        student = self._logits(self._exit(images, self._thirds)) / 2
        return -(teacher.softmax(dim=1) * student.log_softmax(dim=1)).sum()

    def after_training(self, data: TrainingData) -> None:
        """Measure the prototypes of the new classes; nothing is merged."""
        classes = self.experience.classes
        self.head.write(class_means(self.features, data.plain(), classes), classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to their cosines (B, classes seen) with the prototypes."""
        logits = []
        for index, means in enumerate(self.head.means.split(self.head.sizes)):
            with _active(self.specific, self._rows(index)):
                logits.append(cosine_similarities(self.features(images), means))
        return torch.cat(logits, dim=1)

    def _distil(self, images: Tensor) -> None:
        """Take a step down the distillation, whose gradient counts most where the up-projection is large."""
        tensors = self._distilled()
        gradients = torch.autograd.grad(self.distillation_weight * self.distillation(images), tensors)
        *sums, count = self.summed([*gradients, gradients[-1].new_tensor(len(images))])
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()  # Lightning keeps gradients until the next backward pass
        for tensor, gradient in zip(tensors, sums, strict=True):
            tensor.grad = gradient / count
        for layer in self.shared:
            for third in self._thirds:
                of_live = layer.adapter(third).B.grad
                assert of_live is not None
                of_live *= multipliers(layer.adapter(_name(third, "before")).B)
        optimizer.step()
        optimizer.zero_grad()
        torch.clear_autocast_cache()  # it may hold copies of parameters as they were before the step

    def _exit(self, images: Tensor, rows: dict[str, slice]) -> Tensor:
        """Return the features (B, d) after the early blocks, under the shared adapters named in ``rows``."""
        vit: Any = self.backbone.vit
        images = (images - self.backbone.mean) / self.backbone.std
        with _active(self.shared, rows):
            x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
            for block in self.backbone.blocks[: self.early]:
                x = block(x)
        features: Tensor = vit.forward_head(vit.norm(x))
        return features

    def _logits(self, features: Tensor) -> Tensor:
        logits: Tensor = self.temper * cosine_similarities(features, self.weight)
        return logits

    def _distilled(self) -> list[nn.Parameter]:
        return [*(adapter.B for adapter in self._shared()), self.weight, self.temper]

    def _shared(self) -> Iterator[LowRank]:
        return (layer.adapter(third) for layer in self.shared for third in self._thirds)

    def _rows(self, of: int | str) -> dict[str, slice]:
        return {_name(third, of): rows for third, rows in self._thirds.items()}


def orthonormal(down: Tensor) -> Tensor:
    """Return a random matrix of the shape of a down-projection (r, n), with orthonormal rows."""
    basis: Tensor = torch.linalg.qr(torch.rand_like(down).mT).Q.mT
    return basis


def multipliers(up: Tensor) -> Tensor:
    """Return a factor (m, 1) for each row of the gradient of an up-projection (m, r), 1 on average.

    >>> multipliers(torch.tensor([[3.0], [1.0]])).flatten().tolist()
    [1.5, 0.5]
    """
    lengths = up.detach().norm(dim=1, keepdim=True)
    factors: Tensor = lengths / lengths.mean().clamp(min=1e-12)
    return factors


def _name(third: str, of: int | str) -> str:
    """Return the name of an adapter; those of the first experience have the names of their targets."""
    return f"{third}_{of}" if of else third


@contextmanager
def _active(layers: list[AdaptedLinear], rows: dict[str, slice]) -> Iterator[None]:
    """Let only the adapters named in ``rows`` act in ``layers`` inside the context."""
    before = [layer.rows for layer in layers]
    for layer in layers:
        layer.rows = dict(rows)
    try:
        yield
    finally:
        for layer, usual in zip(layers, before, strict=True):
            layer.rows = usual
