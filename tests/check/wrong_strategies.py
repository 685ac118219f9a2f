"""Strategies that are wrong on purpose, each in one way that the contract kit must find."""

from typing import Any

import torch
from torch import Tensor, nn

from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import Batch, Promises, Strategy, TrainingData
from cl_bench.data.experience import Experience
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import GrowingLinear


class Jumps(LowRankStrategy):
    """Starts every experience with an adapter that already does something."""

    def expand(self, experience: Experience) -> None:
        super().expand(experience)
        for _, adapter in self.adapters():
            nn.init.normal_(adapter.B, std=0.1)


class JumpsAndSaysSo(Jumps):
    """The same, declared."""

    promises = Promises(start_within=None)


class ZeroesAGradient(Strategy):
    """Holds a weight of the backbone by zeroing its gradient, which does not stop a weight decay."""

    def __init__(self, backbone: Backbone, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        backbone.vit.get_parameter("norm.weight").requires_grad_(True)

    def rectify_gradients(self) -> None:
        gradient = self.backbone.vit.get_parameter("norm.weight").grad
        assert gradient is not None
        gradient.zero_()


class Reorders(Strategy):
    """Changes places in an MLP after training: the same function, other weights."""

    def after_training(self, data: TrainingData) -> None:
        mlp = self.backbone.blocks[0].get_submodule("mlp")
        places = torch.arange(mlp.get_parameter("fc1.weight").shape[0]).roll(1)
        for name in ("fc1.weight", "fc1.bias"):
            mlp.get_parameter(name).copy_(mlp.get_parameter(name)[places])
        mlp.get_parameter("fc2.weight").copy_(mlp.get_parameter("fc2.weight")[:, places])


class LowersOldLogits(Strategy):
    """Takes something off the bias of every old class."""

    def after_training(self, data: TrainingData) -> None:
        assert isinstance(self.head, GrowingLinear)
        for part in self.head.parts[:-1]:
            part.get_parameter("bias").sub_(0.1)


class MergesWithoutScale(LowRankStrategy):
    """Merges B A where s B A was trained."""

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


class CentresBatches(Strategy):
    """Takes the mean of the batch off the features at test time."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        logits: Tensor = self.head(features - features.mean(dim=0))
        return logits


class AsksForTheTask(Strategy):
    """Takes a task id at test time."""

    def forward(self, images: Tensor, task: int | None = None) -> Tensor:
        return super().forward(images)


class ReadsTheLabels(Strategy):
    """Raises the logits of the experience that the label belongs to."""

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = super().test_step(batch, batch_idx)
        own = torch.arange(logits.shape[1]) // 2 == batch[1][:, None] // 2
        return logits + 10 * own


class Replays(Strategy):
    """Shows the backbone the images of the experience before."""

    def __init__(self, backbone: Backbone, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.kept: list[Tensor] = []

    def before_training(self, data: TrainingData) -> None:
        for images in self.kept:
            self.features(images)
        self.kept = [images for images, _ in data.plain()]


class PeeksAtTheTest(Strategy):
    """Reads the test images while it trains."""

    def after_training(self, data: TrainingData) -> None:
        list(self.trainer.datamodule.test_dataloader())  # type: ignore[attr-defined]


class DrawsTooEarly(Strategy):
    """Draws in the constructor what training depends on."""

    noise: Tensor

    def __init__(self, backbone: Backbone, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.register_buffer("noise", torch.randn(backbone.feature_dim))

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        return super().loss(features + self.noise, labels)


class KeepsAPlainTensor(Strategy):
    """Remembers by an attribute that no checkpoint holds."""

    def __init__(self, backbone: Backbone, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.centre: Tensor | None = None

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        return super().loss(features if self.centre is None else features - self.centre, labels)

    def after_training(self, data: TrainingData) -> None:
        self.centre = torch.cat([self.features(images) for images, _ in data.plain()]).mean(dim=0)


class HoardsUpdates(LowRankStrategy):
    """Keeps every merged update."""

    def expand(self, experience: Experience) -> None:
        super().expand(experience)
        self.register_buffer(f"update_{experience.index}", torch.zeros(32, 32))

    def after_training(self, data: TrainingData) -> None:
        self.get_buffer(f"update_{self.experience.index}").copy_(self.layers[0].adapter("k").delta())
        super().after_training(data)


class KeepsHalf(Strategy):
    """Stores what mixed precision computes as it comes."""

    def __init__(self, backbone: Backbone, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.register_buffer("centre", torch.zeros(2))

    def after_training(self, data: TrainingData) -> None:
        assert isinstance(self.head, GrowingLinear)
        for images, _ in data.plain():
            with self.trainer.precision_plugin.forward_context():
                self.centre = self.head.current(self.backbone(images)).mean(dim=0)


class DecomposesFeatures(Strategy):
    """Decomposes features in the precision of the trainer, which has no such routine in half."""

    def before_training(self, data: TrainingData) -> None:
        for images, _ in data.plain():
            with self.trainer.precision_plugin.forward_context():
                projected = self.backbone.vit.get_submodule("blocks.0.mlp.fc1")(self.features(images))
            torch.linalg.svd(projected)


class RepeatsItself(Strategy):
    """Takes one more product in a step for every experience so far."""

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        assert isinstance(self.head, GrowingLinear)
        for _ in range(self.experience.index):
            self.head.current(features)
        return super().loss(features, labels)


class RepeatsItselfAndBlamesTheBasis(RepeatsItself):
    """The same, declared to be due to a basis that does not exist."""

    promises = Promises(step_grows_with=("basis",))


class RepeatsItselfAndSaysSo(RepeatsItself):
    """The same, declared."""

    promises = Promises(step_grows_with=("classes",))
