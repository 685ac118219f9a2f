"""Strategies that are wrong on purpose, each in one way that the contract kit must find."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import Promises, Strategy, TrainingData
from cl_bench.data.experience import Experience
from cl_bench.measure.means import class_means
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import GrowingLinear, pooled
from cl_bench.network.prompts import Prompts


class Jumps(LowRankStrategy):
    """Starts every experience with an adapter that already adds something."""

    def expand(self, experience: Experience) -> None:
        super().expand(experience)
        for _, adapter in self.adapters():
            nn.init.normal_(adapter.B, std=0.1)


class JumpsAndSaysSo(Jumps):
    """The same, declared."""

    promises = Promises(start_within=None)


class DrawsOnce(Strategy):
    """Shifts the features by noise, drawn for the whole stream in the first experience, without a promise."""

    shift: Tensor

    def __init__(self, backbone: Backbone, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.register_buffer("shift", torch.zeros(backbone.feature_dim))

    def expand(self, experience: Experience) -> None:
        super().expand(experience)
        if experience.index in self.drawn_in:
            self.shift = torch.randn(len(self.shift))

    def features(self, images: Tensor) -> Tensor:
        return pooled(super().features(images)) + self.shift

    @property
    def drawn_in(self) -> Sequence[int]:
        return (0,)


class DrawsOnceAndSaysSo(DrawsOnce):
    """The same, declared."""

    promises = Promises(drawn_once=True)


class DrawsTwice(DrawsOnceAndSaysSo):
    """Declares that it draws once, and draws again in the third experience."""

    @property
    def drawn_in(self) -> Sequence[int]:
        return (0, 2)


class DrawsUnannounced(Strategy):
    """Makes in the first expand what its features need, without a promise."""

    def expand(self, experience: Experience) -> None:
        super().expand(experience)
        if experience.is_first:
            self.prompts = nn.Parameter(torch.randn(2, self.backbone.feature_dim))

    def features(self, images: Tensor) -> Tensor:
        found: Tensor = self.backbone(images, Prompts(self.prompts))
        return found


class DrawsPromptsTooEarly(Strategy):
    """Draws its prompts in the constructor."""

    def __init__(self, backbone: Backbone, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.prompts = nn.Parameter(torch.randn(2, backbone.feature_dim))

    def features(self, images: Tensor) -> Tensor:
        found: Tensor = self.backbone(images, Prompts(self.prompts))
        return found


class ClimbsTheLoss(Strategy):
    """Trains with the wrong sign."""

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        return -super().loss(features, labels)


class ShiftsTheLabels(Strategy):
    """Trains every image with the label of another."""

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        return super().loss(features, labels.roll(1))


class TrainsOldAdapters(LowRankStrategy):
    """Adds an adapter to every projection in every experience, and does not freeze the older ones."""

    promises = Promises(state_grows_with=("experiences",), step_grows_with=("experiences",))

    def renew(self) -> None:
        if self.experience.is_first:
            super().renew()
            return
        for layer in self.layers:
            for target in ("k", "v"):
                layer.add(f"{target}_{self.experience.index}", layer.rows[target], self.rank)

    def after_training(self, data: TrainingData) -> None:
        """Keep the adapters."""


class ZeroesAGradient(Strategy):
    """Zeroes the gradient of a backbone weight, which does not stop a weight decay."""

    def __init__(self, backbone: Backbone, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        backbone.vit.get_parameter("norm.weight").requires_grad_(True)

    def rectify_gradients(self) -> None:
        gradient = self.backbone.vit.get_parameter("norm.weight").grad
        assert gradient is not None
        gradient.zero_()


class Reorders(Strategy):
    """Permutes the units of an MLP after training: the same function, other weights."""

    def after_training(self, data: TrainingData) -> None:
        mlp = self.backbone.blocks[0].get_submodule("mlp")
        places = torch.arange(mlp.get_parameter("fc1.weight").shape[0]).roll(1)
        for name in ("fc1.weight", "fc1.bias"):
            mlp.get_parameter(name).copy_(mlp.get_parameter(name)[places])
        mlp.get_parameter("fc2.weight").copy_(mlp.get_parameter("fc2.weight")[:, places])


class LowersOldLogits(Strategy):
    """Lowers the bias of every old class."""

    def after_training(self, data: TrainingData) -> None:
        assert isinstance(self.head, GrowingLinear)
        for part in self.head.parts[:-1]:
            part.get_parameter("bias").sub_(0.1)


class MergesWithoutScale(LowRankStrategy):
    """Merges B A although s B A was trained."""

    def __init__(self, backbone: Backbone, *, scale: float = 0.5, **kwargs: Any) -> None:
        super().__init__(backbone, scale=scale, **kwargs)

    def after_training(self, data: TrainingData) -> None:
        for layer in self.layers:
            for name, rows in layer.rows.items():
                layer.weight[rows] += layer.adapter(name).B @ layer.adapter(name).A
                layer.adapter(name).B.zero_()


class ReplacesParameters(LowRankStrategy):
    """Makes a new parameter after the optimizer was built."""

    def before_training(self, data: TrainingData) -> None:
        for _, adapter in self.adapters():
            adapter.A = nn.Parameter(adapter.A.detach().clone())


class DrawsTooEarly(Strategy):
    """Draws noise for the loss in the constructor."""

    noise: Tensor

    def __init__(self, backbone: Backbone, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.register_buffer("noise", 0.1 * torch.randn(backbone.feature_dim))  # it can still learn

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        return super().loss(pooled(features) + self.noise, labels)


class KeepsAPlainTensor(Strategy):
    """Keeps a tensor in an attribute, which no checkpoint holds."""

    def __init__(self, backbone: Backbone, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.centre: Tensor | None = None

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        return super().loss(pooled(features) - (0 if self.centre is None else self.centre), labels)

    def after_training(self, data: TrainingData) -> None:
        self.centre = class_means(self.features, data.plain(), self.experience.classes).mean(dim=0)


class RemembersInItsClass(Strategy):
    """Keeps the mean feature of an experience in its class, which outlives it in the process."""

    centres: ClassVar[dict[int, Tensor]] = {}

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        centre = 0 if self.experience.is_first else self.centres[self.experience.index - 1]
        return super().loss(pooled(features) - centre, labels)

    def after_training(self, data: TrainingData) -> None:
        classes = self.experience.classes
        self.centres[self.experience.index] = class_means(self.features, data.plain(), classes).mean(dim=0)


class RemembersInExtraState(Strategy):
    """Keeps a list of numbers for every experience outside of tensors."""

    def __init__(self, backbone: Backbone, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.centres: list[list[float]] = []

    def after_training(self, data: TrainingData) -> None:
        centre = class_means(self.features, data.plain(), self.experience.classes).mean(dim=0)
        self.centres.append(centre.tolist())

    def get_extra_state(self) -> list[list[float]]:
        return list(self.centres)

    def set_extra_state(self, state: list[list[float]]) -> None:
        self.centres = list(state)


class HidesInItsOptimizer(Strategy):
    """Keeps more than moments in the state of the optimizer of its stream."""

    optimizer_scope = "stream"

    def after_training(self, data: TrainingData) -> None:
        assert self.kept_optimizer is not None
        first = next(iter(self.kept_optimizer.state.values()))
        first["updates"] = torch.zeros(100_000)


class HoardsUpdates(LowRankStrategy):
    """Keeps every merged update."""

    def expand(self, experience: Experience) -> None:
        super().expand(experience)
        self.register_buffer(f"update_{experience.index}", torch.zeros(self.copies, 32, 32))

    def after_training(self, data: TrainingData) -> None:
        self.get_buffer(f"update_{self.experience.index}").copy_(self.layers[0].adapter("k").delta())
        super().after_training(data)

    @property
    def copies(self) -> int:
        return 1


class HoardsUpdatesAndSaysSo(HoardsUpdates):
    """The same, declared."""

    promises = Promises(state_grows_with=("experiences",))


class HoardsMoreAndMore(HoardsUpdatesAndSaysSo):
    """Growth that is declared, but of more bytes in every experience."""

    @property
    def copies(self) -> int:
        return 1 + self.experience.index


class DeclaresGrowthInVain(LowRankStrategy):
    """Declares that its state grows with experiences, and merges all of it."""

    promises = Promises(state_grows_with=("experiences",))


class FattensItsHead(Strategy):
    """Adds more to the head in every experience, whatever its number of classes."""

    def expand(self, experience: Experience) -> None:
        super().expand(experience)
        assert isinstance(self.head, GrowingLinear)
        self.head.register_buffer(f"notes_{experience.index}", torch.zeros(experience.index))


class KeepsHalf(Strategy):
    """Stores a mean in the half precision in which it was computed."""

    def __init__(self, backbone: Backbone, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.register_buffer("centre", torch.zeros(2))

    def after_training(self, data: TrainingData) -> None:
        assert isinstance(self.head, GrowingLinear)
        for images, _ in data.plain():
            with self.trainer.precision_plugin.forward_context():
                self.centre = self.head.current(self.backbone(images)).mean(dim=0)


class DecomposesFeatures(Strategy):
    """Decomposes features in the precision of the trainer; torch cannot do so in half precision."""

    def before_training(self, data: TrainingData) -> None:
        for images, _ in data.plain():
            with self.trainer.precision_plugin.forward_context():
                projected = self.backbone.vit.get_submodule("blocks.0.mlp.fc1")(self.features(images))
            torch.linalg.svd(projected)


class RepeatsItself(Strategy):
    """Computes one more product in a step for every old experience."""

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        assert isinstance(self.head, GrowingLinear)
        for _ in range(self.times):
            self.head.current(pooled(features))
        return super().loss(features, labels)

    @property
    def times(self) -> int:
        return self.experience.index


class RepeatsItselfAndBlamesTheBasis(RepeatsItself):
    """The same, explained by a basis that does not exist."""

    promises = Promises(step_grows_with=("basis",))


class RepeatsItselfAndSaysSo(RepeatsItself):
    """The same, declared."""

    promises = Promises(step_grows_with=("experiences",))


class RepeatsItselfMoreAndMore(RepeatsItselfAndSaysSo):
    """Growth that is declared, but faster than that: with the square."""

    @property
    def times(self) -> int:
        return self.experience.index**2


class DeclaresMovingFeatures(LowRankStrategy):
    """Trains adapters in every experience, and declares that features never change."""

    promises = Promises(constant="features")
