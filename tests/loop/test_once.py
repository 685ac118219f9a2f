"""What a strategy promises to be constant is computed once for each test image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from cl_bench.contracts.strategy import Promises, Strategy
from cl_bench.loop.checkpoint import Checkpoints
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.network.backbones import Backbone
from cl_bench.results.result import Result
from datamodules.toy import Toy
from strategies.linear_probe import LinearProbe
from strategies.ncm import NearestClassMean

FEW: dict[str, Any] = {"num_classes": 6, "num_experiences": 3}


class Shown(Callback):
    """Counts the test images that reach the blocks, and keeps the logits of every evaluation."""

    def __init__(self) -> None:
        self.images = 0
        self.logits: list[list[Tensor]] = []

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self.logits.append([])
        embedding = pl_module.backbone.vit.patch_embed
        self.handle = embedding.register_forward_pre_hook(self.count)

    def count(self, module: Any, inputs: Any) -> None:
        self.images += len(inputs[0])

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any, **__: Any) -> None:
        self.logits[-1].append(outputs.clone())

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self.handle.remove()


class NothingKept(NearestClassMean):
    promises = Promises()


class NoProbe(LinearProbe):
    promises = Promises()


class Moving(LinearProbe):
    """Declares constant features although a shift of them is trained."""

    promises = Promises(constant="features")

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.shift = torch.nn.Parameter(torch.zeros(backbone.feature_dim))

    def features(self, images: Tensor) -> Tensor:
        moved: Tensor = self.backbone(images) + self.shift
        return moved


class Undeclared(Moving):
    promises = Promises()


class Queried(Undeclared):
    """Adds a trained shift to a query by the frozen backbone."""

    promises = Promises(constant="query")

    def query(self, images: Tensor) -> Tensor:
        found: Tensor = self.backbone(images)
        return found

    def features(self, images: Tensor) -> Tensor:
        moved: Tensor = self.query(images) + self.shift
        return moved


@pytest.fixture
def backbone(tiny_backbone: Callable[..., Backbone]) -> Backbone:
    return tiny_backbone()


def walked(strategy: Strategy, folder: Path | None = None, **changes: Any) -> tuple[Shown, Result]:
    shown = Shown()
    precision = changes.pop("precision", "32-true")
    trainer = StreamTrainer(
        max_epochs=changes.pop("max_epochs", 1), accelerator="cpu", callbacks=[shown], precision=precision
    )
    kept = None if folder is None else Checkpoints(folder, "cell")
    stream = Toy(
        **{
            **FEW,
            "image_size": 8,
            "images_per_class": 3,
            "noise": 0.6,
            "test_images_per_class": 5,
            "batch_size": 3,
            **changes,
        }
    )
    return shown, trainer.run(strategy, stream, checkpoints=kept)


def same(one: tuple[Shown, Result], other: tuple[Shown, Result]) -> bool:
    logits = [[batch for row in shown.logits for batch in row] for shown in (one[0], other[0])]
    return one[1].rows == other[1].rows and all(map(torch.equal, *logits))


def test_twenty_experiences_show_the_network_every_test_image_once(backbone: Backbone) -> None:
    shown, _ = walked(NearestClassMean(backbone), num_classes=20, num_experiences=20)
    assert shown.images == 20 * 5


@pytest.mark.parametrize("workers", (0, 1))
def test_features_computed_once_give_the_same_bits_as_computed_again(
    backbone: Backbone, workers: int
) -> None:
    once, again = (walked(kind(backbone), num_workers=workers) for kind in (NearestClassMean, NothingKept))
    assert once[0].images == 30
    assert again[0].images == 10 + 20 + 30
    assert same(once, again)


@pytest.mark.parametrize("precision", ("32-true", "bf16-mixed", "64-true"))
def test_a_trained_head_reads_the_same_features_in_any_precision(
    tiny_backbone: Callable[..., Backbone], precision: str
) -> None:
    once, again = (walked(kind(tiny_backbone()), precision=precision) for kind in (LinearProbe, NoProbe))
    assert once[0].images == 30 < again[0].images
    assert same(once, again)


def test_moved_weights_are_noticed_and_everything_is_computed_again(
    tiny_backbone: Callable[..., Backbone],
) -> None:
    moving, honest = (walked(kind(tiny_backbone())) for kind in (Moving, Undeclared))
    assert moving[0].images == honest[0].images == 10 + 20 + 30
    assert same(moving, honest)


def test_a_query_is_kept_while_the_features_move(tiny_backbone: Callable[..., Backbone]) -> None:
    queried, honest = (walked(kind(tiny_backbone())) for kind in (Queried, Undeclared))
    assert queried[0].images == 30
    assert same(queried, honest)


@pytest.mark.parametrize("damage", (False, True))
def test_a_resumed_run_reads_what_is_kept_unless_it_is_damaged(
    backbone: Backbone, tmp_path: Path, damage: bool
) -> None:
    class Cut(NearestClassMean):
        def expand(self, experience: Any) -> None:
            if experience.index == 2:
                raise RuntimeError("cut off")
            super().expand(experience)

    Cut.__module__, Cut.__qualname__ = NearestClassMean.__module__, NearestClassMean.__qualname__
    with pytest.raises(RuntimeError, match="cut off"):
        walked(Cut(backbone), tmp_path)
    files = sorted(tmp_path.glob("features/1-of-1/*.pt"))
    assert len(files) == 2
    if damage:
        content = bytearray(files[1].read_bytes())
        content[len(content) // 2] ^= 1
        files[1].write_bytes(content)
    resumed, whole = walked(NearestClassMean(backbone), tmp_path), walked(NearestClassMean(backbone))
    assert resumed[0].images == 30 - (10 if damage else 20)
    assert resumed[1].rows == whole[1].rows
    assert not tmp_path.exists()
