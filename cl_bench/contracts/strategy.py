"""The contract of a continual-learning method.

A strategy owns a frozen backbone, adapters inside it if the method has any, and a head that grows. It meets
one :class:`~cl_bench.data.experience.Experience` at a time and never learns which experience a test image is
from.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_bench.data.experience import Experience
from cl_bench.maths.losses import local_cross_entropy
from cl_bench.maths.memory import GPM
from cl_bench.maths.schedules import QuarterCosine
from cl_bench.measure.means import class_means
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import GrowingLinear, Prototypes
from cl_bench.processes.ranks import connected, part, totals

Batch = tuple[Tensor, Tensor]
"""Images (B, 3, H, W) in [0, 1] and labels (B,), which are positions in the class order."""

_HEAD_SCALE = 30.0


class TrainingData(Protocol):
    """The training images of the experience at hand, already on the training device."""

    def augmented(self) -> Iterable[Batch]:
        """Yield every training image once, drawn as in training."""
        ...

    def plain(self) -> Iterable[Batch]:
        """Yield every training image once, transformed as at test time."""
        ...


@dataclass(frozen=True)
class Promises:
    """What a method keeps to; ``cl-bench check`` holds it to that.

    The defaults are what most methods can promise. One that cannot says so where it sets ``promises``, which
    makes the exception a documented part of the method.

    Attributes:
        start_within: Largest change of a feature, or of the logit of an old class, from the end of an
            experience to the first step of the next; 0 for the same bits, None where that changes on purpose.
        merge_within: Largest change of a feature by ``after_training``, which merging moves by rounding
            alone; None where the method changes what it has trained.
        keeps_old_head: Whether the head leaves what belongs to old classes as it is, bit by bit.
        vectors_per_class: Features kept for each class beside the head, such as prototypes.
        step_grows_with: What the operations of a training step may grow with, by terms of first order:
            ``basis``, the columns that ``memory`` holds, and ``classes``, the number of old classes.

    >>> Promises(start_within=1e-5).merge_within
    1e-05
    """

    start_within: float | None = 0.0
    merge_within: float | None = 1e-5
    keeps_old_head: bool = True
    vectors_per_class: int = 0
    step_grows_with: tuple[Literal["basis", "classes"], ...] = ()


class Strategy(LightningModule):
    """A frozen backbone, a head over the classes seen, and hooks that a method overrides.

    For every experience the trainer calls, in this order: :meth:`expand`; :meth:`start_head`;
    :meth:`before_training`; then for each step :meth:`loss`, :meth:`rectify_gradients` and
    :meth:`after_step`; then :meth:`after_training`.

    A strategy draws random numbers in these hooks, not in its constructor: the trainer seeds the generators
    at the start of every experience. What it must remember is a parameter or a buffer, or plain numbers and
    words that a module of it returns from torch's ``get_extra_state``: then a run that was cut off goes on
    where it was. What is made of these alone may be made again in Lightning's ``on_load_checkpoint``.

    Attributes:
        name: What tables call the method; the name of its class unless it sets another.
        variant: Which of its meanings this is, where it has several.
        promises: What the method keeps to, where that differs from what most do.
        memory: Protected input directions of each adapted layer, where the method keeps any.

    Args:
        backbone: Pre-trained vision transformer; the strategy freezes it.
        optimizer: Called with the parameter groups at the start of every experience.
        scheduler: Called with the optimizer; stepped once an epoch.
        head_lr: Learning rate of the head, where it differs from that of the adapters.
        head_start: Where the head of new classes starts: random, as PyTorch draws it; or means, from their
            mean features. A head of prototypes is one of means at all times.
    """

    name: str
    variant: str | None = None
    promises: Promises = Promises()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Name a method after its class unless it says otherwise."""
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def __init__(
        self,
        backbone: Backbone,
        *,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.Adam(parameters, lr=5e-4),
        scheduler: LRSchedulerCallable | None = None,
        head_lr: float | None = None,
        head_start: Literal["random", "means"] = "random",
    ) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.head: GrowingLinear | Prototypes = GrowingLinear(backbone.feature_dim)
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._head_lr = head_lr
        self._head_start = head_start
        self._pretrained_bytes = _state_bytes(backbone)
        self._experience: Experience | None = None
        self.memory: GPM | None = None

    # What a method overrides

    def expand(self, experience: Experience) -> None:
        """Make room for the classes of ``experience``, before optimisers exist."""
        self._experience = experience
        self.head.grow(experience.num_classes)

    def start_head(self, data: TrainingData) -> None:
        """Start the head of the new classes where the setting says; one pass over plain images for means.

        Its logits then are 30 times the cosine to each mean for features of average length, so that heads of
        different experiences compare from the start. The scale is that of the classifier of KeepLoRA+,
        https://arxiv.org/abs/2601.19659.
        """
        if self._head_start == "means" and isinstance(self.head, GrowingLinear):
            means = class_means(self.features, data.plain(), self.experience.classes)
            length = means.norm(dim=1).square().mean().sqrt()
            self.head.write_current(_HEAD_SCALE * F.normalize(means) / length)

    def before_training(self, data: TrainingData) -> None:
        """Measure the data before the first step; tensors that the optimiser holds are written in place."""

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of features (B, d) and labels (B,).

        It is the cross-entropy over the classes of this experience unless a method overrides it.
        """
        assert isinstance(self.head, GrowingLinear)
        return local_cross_entropy(self.head.current(features), labels, self.experience.classes.start)

    def rectify_gradients(self) -> None:
        """Edit the gradients: after backward and unscaling, before clipping."""

    def after_step(self) -> None:
        """Edit the parameters after the optimiser moved them."""

    def after_training(self, data: TrainingData) -> None:
        """Measure, remember and merge after the last step."""

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, classes seen)."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return what the optimiser trains: everything with a gradient, the head as a group of its own."""
        head = [p for p in self.head.parameters() if p.requires_grad]
        in_head = set(map(id, head))
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in in_head]
        head_group: dict[str, Any] = {"params": head}
        if self._head_lr is not None:
            head_group["lr"] = self._head_lr
        return [group for group in ({"params": rest}, head_group) if group["params"]]

    # What everyone may ask

    def features(self, images: Tensor) -> Tensor:
        """Return the backbone's features (B, d) of images (B, 3, H, W), in the precision of the trainer.

        The hooks around training run outside of mixed precision, so that merging and closed forms are exact;
        this is how they see images as training does.
        """
        attached = self._trainer is not None
        with self.trainer.precision_plugin.forward_context() if attached else nullcontext():
            found: Tensor = self.backbone(images)
        return found

    @property
    def experience(self) -> Experience:
        """The experience at hand."""
        if self._experience is None:
            raise RuntimeError("No experience yet: call expand(experience) first.")
        return self._experience

    @property
    def trains(self) -> bool:
        """Whether there is anything for an optimiser to move."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def trainable_parameters(self) -> int:
        """Number of parameters with a gradient."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def stored_bytes(self) -> int:
        """Bytes of state beyond the pre-trained backbone: adapters, heads, prototypes, bases."""
        return _state_bytes(self) - self._pretrained_bytes

    # Wiring into Lightning

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser over the parameter groups of this experience."""
        groups = self.parameter_groups()
        if not groups:
            return None
        optimizer = in_one_kernel(self._optimizer(groups))
        if self._scheduler is None:
            return optimizer
        scheduler = self._scheduler(optimizer)
        if self._trainer is not None and isinstance(scheduler, QuarterCosine):
            scheduler.require_length(self.trainer.max_epochs)
        return [optimizer], [scheduler]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        images, labels = batch
        loss = self.loss(self.features(images), labels)
        self.log_loss(part(loss.detach(), len(labels)), len(labels))
        return loss

    def log_loss(self, loss: Tensor, count: int) -> None:
        """Draw the curve of the loss of a batch, of which this is the share of ``count`` images."""
        images: Any = count
        if connected():  # a tensor, so that no step waits for it
            loss, images = totals([loss, loss.new_tensor(count)])
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=images)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the logits (B, classes seen) of one batch; the labels stay outside."""
        logits: Tensor = self(batch[0])
        return logits

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Let the method edit the gradients."""
        self.rectify_gradients()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the method edit the parameters."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.after_step()


def in_one_kernel(optimizer: Optimizer) -> Optimizer:
    """Let ``optimizer`` move all parameters at once where PyTorch can, unless it was told how to.

    Each by itself, the many small factors of the adapters would take longer to move than the arithmetic does.

    >>> optimizer = in_one_kernel(torch.optim.Adam([torch.zeros(1, requires_grad=True)]))
    >>> optimizer.param_groups[0]["fused"]
    True
    """
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.SGD)):  # AdamW is an Adam
        for group in optimizer.param_groups:
            if group["fused"] is None and group["foreach"] is None and not group["differentiable"]:
                group["fused"] = True
    return optimizer


def _state_bytes(module: nn.Module) -> int:
    state = module.state_dict().values()
    return sum(value.numel() * value.element_size() for value in state if isinstance(value, Tensor))
