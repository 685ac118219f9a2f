"""The contract of a continual-learning method.

A strategy owns a frozen backbone, whatever it trains inside that, and a head that grows. It meets one
:class:`~cl_bench.data.experience.Experience` at a time and never learns which one a test image is from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_bench.data.experience import Batch, Experience
from cl_bench.maths.losses import local_cross_entropy
from cl_bench.measure.means import class_means
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import GrowingLinear, Head, TrainableHead, pooled
from cl_bench.processes.ranks import connected, from_first, gathered, part, totals


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
    """What a method guarantees; ``cl-bench check`` verifies it from both sides.

    The defaults are what most methods can guarantee. A method that cannot sets ``promises``, which makes the
    exception a documented part of the method. An exception that the method does not use is refused.

    Attributes:
        start_within: Largest change of a feature, or of the logit of an old class, from the end of an
            experience to the first step of the next; 0 for the same bits, None if it changes on purpose.
        merge_within: Largest change of a feature by ``after_training``, where merging only rounds; None if
            the method changes what it has trained.
        keeps_old_head: Whether the head leaves what belongs to old classes as it is, bit by bit.
        vectors_per_class: Features kept for each class outside the head: 1 for a prototype, d + 1 for a mean
            and a covariance (d, d).
        state_grows_with: What an experience adds to the state outside head, memory and declared vectors:
            ``experiences``, at most what the second one added; ``classes``, at most that much more than the
            one before, such as a prototype of every class seen in a space of its own, head included.
        step_grows_with: What the operations of a training step grow with, by terms of first order:
            ``basis``, the columns that ``memory`` holds, ``classes``, the number of old classes, and
            ``experiences``, the number of old experiences.
        drawn_once: Whether the first ``expand`` draws random parts that serve the whole stream, such as a
            pool of prompts. They change the function in the first experience, and in no other.
        training_data: What is kept of training images after their experience: ``none``, statistics such as
            class means and bases included; ``features`` of single images; or ``images``. Results show it.
        constant: The map of an image, ``features`` or a method ``query(images)``, whose outputs in evaluation
            mode never change once the first experience is learnt. The loop then sends every test image
            through it once a stream.

    >>> Promises(start_within=1e-5).merge_within
    1e-05
    """

    start_within: float | None = 0.0
    merge_within: float | None = 1e-5
    keeps_old_head: bool = True
    vectors_per_class: int = 0
    state_grows_with: tuple[Literal["experiences", "classes"], ...] = ()
    step_grows_with: tuple[Literal["basis", "classes", "experiences"], ...] = ()
    drawn_once: bool = False
    training_data: Literal["none", "features", "images"] = "none"
    constant: Literal["features", "query"] | None = None


class Strategy(LightningModule):
    """A frozen backbone, a head over the classes seen, and hooks that a method overrides.

    For every experience the trainer calls, in this order: :meth:`expand`; :meth:`start_head`;
    :meth:`before_training`; then for each step :meth:`features`, :meth:`loss`, :meth:`rectify_gradients` and
    :meth:`after_step`; then :meth:`after_training`.

    A strategy draws random numbers in these hooks, not in its constructor: the trainer seeds the generators
    at the start of every experience. What it must remember is a parameter or a buffer, or plain numbers and
    words that one of its modules returns from torch's ``get_extra_state``: a run can then resume after an
    interruption. All of it counts as stored. What is computed only from these may be computed again in
    Lightning's ``on_load_checkpoint``.

    Attributes:
        name: What tables call the method; the name of its class unless it sets another.
        variant: Which of its meanings this is, if it has several.
        promises: What the method guarantees, where that differs from the defaults.
        loss_over: Which classes the loss compares: those of the ``experience``, as the default loss does, or
            all ``seen``. The former is zero for a single class, so such an experience is refused.
        optimizer_scope: ``experience`` builds the optimizer anew for every experience; ``stream`` keeps one,
            with its state, and adds the new parameters of each experience to it.
        small: Settings with which it fits the tiny transformer of ``cl-bench check``, if its defaults do not.

    Args:
        backbone: Pre-trained vision transformer; the strategy freezes it.
        optimizer: Called with the parameter groups.
        scheduler: Called with the optimizer at the start of every experience; stepped once an epoch.
        head_lr: Learning rate of the head, if it differs from that of the rest.
        head_start: Where the head of new classes starts: random, as PyTorch draws it; or means, from their
            mean features. A head of prototypes always consists of means, so neither setting concerns it.
    """

    name: str
    variant: str | None = None
    promises: Promises = Promises()
    loss_over: Literal["experience", "seen"] = "experience"
    optimizer_scope: Literal["experience", "stream"] = "experience"
    small: ClassVar[Mapping[str, object]] = {}
    head: Head

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Name a method after its class unless it sets another name."""
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
        self.head = GrowingLinear(backbone.feature_dim)
        self.kept_optimizer: Optimizer | None = None
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._head_lr = head_lr
        self._head_start = head_start
        self._pretrained_bytes = state_bytes(backbone)
        self._experience: Experience | None = None

    # What a method overrides

    def expand(self, experience: Experience) -> None:
        """Make room for the classes of ``experience``, before the optimizer is built."""
        self._experience = experience
        self.head.grow(experience.num_classes)

    def start_head(self, data: TrainingData) -> None:
        """Start the head of the new classes by ``head_start``; means take one pass over plain images."""
        if self._head_start == "means" and isinstance(self.head, GrowingLinear):
            self.head.start_from(class_means(self.features, data.plain(), self.experience.classes))

    def before_training(self, data: TrainingData) -> None:
        """Measure the data before the first step; write tensors that the optimizer holds in place."""

    def features(self, images: Tensor) -> Any:
        """Map images (B, 3, H, W) to features (B, d), in training and at test time.

        A method that feeds prompts to the backbone, or reads something else from it, overrides this. If its
        loss needs more than the features, it returns :class:`~cl_bench.network.heads.Features`, and
        :meth:`loss` receives these.
        """
        return self.backbone(images)

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        """Return the scalar loss of what :meth:`features` returned, and labels (B,).

        By default it is the cross-entropy over the classes of this experience.
        """
        if not isinstance(self.head, TrainableHead):
            raise NotImplementedError(f"{self.name} has no loss: its head is measured, not trained.")
        logits = self.head.current(pooled(features))
        return local_cross_entropy(logits, labels, self.experience.classes.start)

    def rectify_gradients(self) -> None:
        """Edit the gradients: after backward and unscaling, before clipping."""

    def after_step(self) -> None:
        """Edit the parameters after the optimizer has moved them."""

    def after_training(self, data: TrainingData) -> None:
        """Measure, remember and merge after the last step."""

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, classes seen)."""
        return self.head(pooled(self.features(images)))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return what the optimizer trains: everything with a gradient, the head as a group of its own."""
        head = [p for p in self.head.parameters() if p.requires_grad]
        in_head = set(map(id, head))
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in in_head]
        head_group: dict[str, Any] = {"params": head}
        if self._head_lr is not None:
            head_group["lr"] = self._head_lr
        return [group for group in ({"params": rest}, head_group) if group["params"]]

    # What every method may use

    @property
    def experience(self) -> Experience:
        """The experience at hand."""
        if self._experience is None:
            raise RuntimeError("There is no experience yet: call expand(experience) first.")
        return self._experience

    @property
    def base_lr(self) -> float:
        """The learning rate of the optimizer, which parameter groups have unless they set their own."""
        return float(self._optimizer([nn.Parameter(torch.empty(0))]).defaults["lr"])

    @property
    def trains(self) -> bool:
        """Whether an optimizer has anything to move."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def trainable_parameters(self) -> int:
        """Number of parameters with a gradient."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def stored_bytes(self) -> int:
        """Bytes of state beyond the pre-trained backbone: adapters, heads, prototypes, bases.

        What modules return from ``get_extra_state`` counts, and the moments of an optimizer of the stream.
        """
        return state_bytes(self) - self._pretrained_bytes + self.optimizer_bytes

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of state of the optimizer that the stream keeps; 0 if every experience builds its own."""
        kept = self.kept_optimizer
        return 0 if kept is None else sum(plain_bytes(list(state.values())) for state in kept.state.values())

    def batch_loss(self, batch: Batch) -> Tensor:
        """Return this process's share of the mean loss of a batch, images and labels.

        The shares of all processes of a run add up to the mean over the whole batch, and so do their
        gradients. A single process has all of it.
        """
        images, labels = batch
        return part(self.loss(self.features(images), labels), len(labels))

    def whole_batch(self, rows: Tensor) -> Tensor:
        """Return the rows (N, …) of the whole batch, of which this process holds some (n, …)."""
        return gathered(rows)

    def agreed(self, drawn: Tensor) -> Tensor:
        """Return a randomly drawn tensor that is the same on all processes: the first process's."""
        return from_first(drawn, self.device)

    def summed(self, shares: Sequence[Tensor]) -> list[Tensor]:
        """Return the sum over all processes of each of ``shares``, such as gradients of a share of a loss."""
        return totals(shares)

    # How Lightning calls it

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer for this experience, or extend the one that the stream keeps."""
        groups = self.parameter_groups()
        if not groups:
            return None
        optimizer = self._extended(groups) if self.optimizer_scope == "stream" else self._optimizer(groups)
        if self._scheduler is None:
            return optimizer
        scheduler = self._scheduler(optimizer)
        require_length = getattr(scheduler, "require_length", None)
        if self._trainer is not None and require_length is not None:
            require_length(self.trainer.max_epochs)
        return [optimizer], [scheduler]

    def _extended(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Return the optimizer of the stream, to which the parameters that it does not hold are added."""
        if self.kept_optimizer is None:
            self.kept_optimizer = self._optimizer(groups)
            return self.kept_optimizer
        held = {id(p) for group in self.kept_optimizer.param_groups for p in group["params"]}
        for group in self.kept_optimizer.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"])  # a schedule starts anew from where it began
        for group in groups:
            new = [p for p in group["params"] if id(p) not in held]
            if new:
                self.kept_optimizer.add_param_group(group | {"params": new})
        return self.kept_optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return this process's share of the loss of one batch."""
        loss = self.batch_loss(batch)
        self.log_loss(loss.detach(), len(batch[1]))
        return loss

    def log_loss(self, loss: Tensor, count: int) -> None:
        """Log this process's share of the batch loss, weighted by ``count`` images."""
        images: Any = count
        if connected():  # a tensor, so that no step waits for it
            loss, images = totals([loss, loss.new_tensor(count)])
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=images)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the logits (B, classes seen) of one batch; the labels are not used."""
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


def state_bytes(module: nn.Module) -> int:
    """Return the bytes of the parameters, persistent buffers and extra states of ``module``, each once."""
    found = {id(value): value for value in module.state_dict(keep_vars=True).values()}.values()
    return sum(
        value.numel() * value.element_size() if isinstance(value, Tensor) else plain_bytes(value)
        for value in found
    )


def plain_bytes(value: Any) -> int:
    """Return the bytes of tensors, text and numbers in ``value``, nested lists and dicts included.

    A number takes 8 bytes, or more if it needs them, and a tensor all of its storage, which is what is saved.

    >>> plain_bytes({"passes": [3, 4], "mean": torch.zeros(2)})
    34
    """
    match value:
        case None:
            return 0
        case Tensor():
            return value.untyped_storage().nbytes()
        case str():
            return len(value.encode())
        case bytes() | bytearray():
            return len(value)
        case int():
            return max(8, (value.bit_length() + 7) // 8)
        case Mapping():
            return sum(map(plain_bytes, value)) + sum(map(plain_bytes, value.values()))
        case list() | tuple() | set() | frozenset():
            return sum(map(plain_bytes, value))
    return int(getattr(value, "nbytes", 8))
