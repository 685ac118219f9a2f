"""Strategies that see or keep data that they should not, each in one way that the contract kit must find."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_bench.contracts.strategy import Promises, Strategy, TrainingData
from cl_bench.data.experience import Batch, Experience
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import pooled
from cl_bench.network.prompts import Prompts

# No task id at test time


class CentresBatches(Strategy):
    """Subtracts the mean of the batch from the features at test time."""

    def forward(self, images: Tensor) -> Tensor:
        features = pooled(self.features(images))
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


class CountsTheBatches(Strategy):
    """Raises the logits of one class by the index of the batch, which follows the classes of the test set."""

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = super().test_step(batch, batch_idx)
        logits[:, batch_idx] += 10
        return logits


class Pool(Strategy):
    """Fixed prompts for images by their strongest colour, drawn once for the whole stream."""

    promises = Promises(drawn_once=True)

    def expand(self, experience: Experience) -> None:
        super().expand(experience)
        if experience.is_first:
            width = self.backbone.feature_dim
            prompts = torch.randn(2, width) + 0.1 * torch.randn(4, 2, width)
            self.prompts = nn.Parameter(prompts, requires_grad=False)

    def features(self, images: Tensor) -> Tensor:
        return self.prompted(images, self.choice(images))

    def choice(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3)).argmax(dim=1)

    def prompted(self, images: Tensor, chosen: Tensor) -> Tensor:
        found: Tensor = self.backbone(images, Prompts(self.prompts[chosen]))
        return found


class PoolSeesTheTask(Pool):
    """Takes the prompts of the experience that the label belongs to."""

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        logits: Tensor = self.head(self.prompted(images, labels // 2))
        return logits


class PoolVotes(Pool):
    """Takes the prompts that most images of the batch would choose."""

    def forward(self, images: Tensor) -> Tensor:
        chosen = self.choice(images)
        logits: Tensor = self.head(self.prompted(images, chosen.mode().values.expand(len(chosen))))
        return logits


class Regression(nn.Module):
    """Ridge regression of the classes on features, solved from sums."""

    products: Tensor
    sums: Tensor

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.num_classes = 0
        self.register_buffer("products", torch.eye(feature_dim, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(0, feature_dim, dtype=torch.float64))

    def grow(self, num_classes: int) -> None:
        self.num_classes += num_classes
        self.sums = F.pad(self.sums, (0, 0, 0, num_classes))

    def add(self, features: Tensor, labels: Tensor) -> None:
        self.products += features.double().T @ features.double()
        self.sums.index_add_(0, labels, features.double())

    def forward(self, features: Tensor) -> Tensor:
        weight: Tensor = torch.linalg.solve(self.products, self.sums.T)
        return features.double() @ weight


class Ridge(Strategy):
    """A ridge head on frozen features, which keeps the contract."""

    promises = Promises(keeps_old_head=False)
    head: Regression

    def __init__(self, backbone: Backbone, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.head = Regression(backbone.feature_dim)

    def after_training(self, data: TrainingData) -> None:
        for images, labels in data.plain():
            self.head.add(pooled(self.features(images)), labels)


class RidgeOfLittle(Ridge):
    """Regularises so little that the head amplifies rounding, which is right."""

    def __init__(self, backbone: Backbone, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.head.products *= 1e-5


class RidgeLearnsAtTest(Ridge):
    """Adds every test image to the sums, under the class that it predicts."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        self.head.add(pooled(self.features(images)), logits.argmax(dim=1))
        return logits


# No data of other experiences


class RidgeFitsTheTest(Ridge):
    """Adds the test images to the sums, with their labels."""

    def after_training(self, data: TrainingData) -> None:
        super().after_training(data)
        for images, labels in self.trainer.datamodule.test_dataloader():  # type: ignore[attr-defined]
            self.head.add(pooled(self.features(images)), labels)


class PeeksAtTheTest(Strategy):
    """Reads the test images while it trains."""

    def after_training(self, data: TrainingData) -> None:
        list(self.trainer.datamodule.test_dataloader())  # type: ignore[attr-defined]


class Replays(Strategy):
    """Shows the backbone the images of older experiences, from the arrays of the dataset."""

    def before_training(self, data: TrainingData) -> None:
        stream: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        for image, label in zip(stream.train.images, stream.train.targets, strict=True):
            if label < self.experience.classes.start:
                self.features(image[None] / 255)


# No data kept


class KeepsImages(Strategy):
    """Keeps every training image outside of tensors, where a checkpoint holds it."""

    promises = Promises(state_grows_with=("experiences",))

    def __init__(self, backbone: Backbone, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.kept: list[Tensor] = []

    def after_training(self, data: TrainingData) -> None:
        self.kept += [self.worth_keeping(images) for images, _ in data.plain()]

    def worth_keeping(self, images: Tensor) -> Tensor:
        return (images * 255).to(torch.uint8)

    def get_extra_state(self) -> list[Tensor]:
        return list(self.kept)

    def set_extra_state(self, state: list[Tensor]) -> None:
        self.kept = list(state)


class KeepsFeatures(KeepsImages):
    """Keeps every feature in the same way."""

    def worth_keeping(self, images: Tensor) -> Tensor:
        return pooled(self.features(images)).clone()


class KeepsFeaturesAndSaysSo(KeepsFeatures):
    """The same, declared."""

    promises = Promises(state_grows_with=("experiences",), training_data="features")


class ReplaysAndSaysSo(KeepsImages):
    """Keeps every image and shows it to the backbone again, as declared."""

    promises = Promises(state_grows_with=("experiences",), training_data="images")

    def before_training(self, data: TrainingData) -> None:
        for images in self.kept:
            self.features(images / 255)


class KeepsImagesAndSaysFeatures(KeepsImages):
    """Declares less than it keeps."""

    promises = Promises(state_grows_with=("experiences",), training_data="features")


class KeepsElsewhere(Strategy):
    """Keeps the training images where no checkpoint has a place for them: in an attribute, unless told."""

    shelf: ClassVar[list[Any]] = []

    def after_training(self, data: TrainingData) -> None:
        self.keep(torch.cat([images for images, _ in data.plain()]))

    def keep(self, images: Tensor) -> None:
        self.kept = [*getattr(self, "kept", []), images]
