from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cl_bench.contracts.photographs import PhotographFiles
from cl_bench.data import manifest
from cl_bench.data.experience import Batch
from cl_bench.data.manifest import Variant
from cl_bench.data.sources import FileSource, Sources
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.network.backbones import Backbone
from cl_bench.prepare.scanning import scan
from cl_bench.run.configuration import layers, resolve
from strategies.linear_probe import LinearProbe
from strategies.ncm import NearestClassMean

CLASSES = 4


class Pictures(PhotographFiles):
    """Pictures ``<class>-<number>.png`` below the root; the last two of each class are test images."""

    name = "pictures"

    def sources(self) -> Sources:
        files = sorted(path.name for path in self._existing_root().glob("*.png"))
        parts: list[list[str]] = [[], []]
        for file in files:
            parts[file.partition("-")[2] >= "6.png"].append(file)
        train, test = (
            FileSource(Path(self.root), part, [int(file.partition("-")[0]) for file in part])
            for part in parts
        )
        return Sources(train, test, [f"class {label}" for label in range(CLASSES)])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.RandomState(0)
    for label in range(CLASSES):
        for number in range(8):
            pixels = generator.randint(256, size=(30, 24 + 4 * number, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{label}-{number}.png")
    return folder


def pictures(root: Path, **arguments: Any) -> Pictures:
    usual: dict[str, Any] = {"root": str(root), "num_experiences": 2, "image_size": 16, "batch_size": 5}
    data = Pictures(**usual | arguments)
    data.setup()
    data.enter(data.experiences[-1])
    return data


def served(batches: Any) -> Batch:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


WAYS: list[dict[str, Any]] = [
    {"cache": "none"},
    {"cache": "pixels"},
    {"cache": "jpeg"},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_batch_holds_images_from_0_to_1_and_positions(root: Path, way: dict[str, Any]) -> None:
    data = pictures(root, **way)
    for loader in (data.train_dataloader(), data.augmented_dataloader(0), data.plain_dataloader()):
        images, labels = served(loader)
        assert images.shape == (12, 3, 16, 16)
        assert images.dtype == torch.float32
        assert 0 <= images.min() < 0.3 < 0.7 < images.max() <= 1
        assert labels.bincount().tolist() == [0, 0, 6, 6]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_workers_change_no_batch(root: Path, way: dict[str, Any]) -> None:
    single, several = pictures(root, **way), pictures(root, num_workers=2, **way)
    for one, other in (
        (single.train_dataloader(), several.train_dataloader()),
        (single.augmented_dataloader(1), several.augmented_dataloader(1)),
        (single.test_dataloader(), several.test_dataloader()),
    ):
        for (images, labels), (other_images, other_labels) in zip(one, other, strict=True):
            assert torch.equal(images, other_images)
            assert torch.equal(labels, other_labels)


def test_workers_load_held_out_classes(root: Path) -> None:
    sides = []
    for num_workers in (0, 2):
        data = pictures(root, num_experiences=3, held_out_classes=1, cache="pixels", num_workers=num_workers)
        loaders = data.held_out_dataloaders()
        assert loaders is not None
        sides.append([served(loader) for loader in loaders])
    for (images, labels), (other_images, other_labels) in zip(*sides, strict=True):
        assert torch.equal(images, other_images)
        assert labels.tolist() == other_labels.tolist() == [0] * len(labels)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_validation_works_with_broken_test_images(root: Path, tmp_path: Path, way: dict[str, Any]) -> None:
    for path in root.glob("*.png"):
        is_test = path.name.partition("-")[2] >= "6.png"
        (tmp_path / path.name).write_bytes(b"no image" if is_test else path.read_bytes())
    chosen = {"num_experiences": 3, "held_out_classes": 1, "val_fraction": 0.34} | way
    data = pictures(tmp_path, **chosen)
    outside = data.held_out_dataloaders()
    assert outside is not None
    for loader in (data.train_dataloader(), data.plain_dataloader(), data.test_dataloader(), *outside):
        assert len(served(loader)[0]) > 0
    with pytest.raises(ValueError, match="cannot be read"):
        list(pictures(tmp_path, **chosen | {"val_fraction": 0.0}).test_dataloader())


def test_a_cache_of_pixels_changes_no_test_image(root: Path) -> None:
    decoded, cached = (served(pictures(root, **way).test_dataloader())[0] for way in WAYS[:2])
    assert torch.equal(decoded, cached)


def test_each_cache_has_a_protocol_of_its_own(root: Path) -> None:
    assert len({str(pictures(root, **way).protocol()) for way in WAYS}) == len(WAYS)


def test_the_protocol_names_torch_if_it_resizes_crops(root: Path) -> None:
    named = ["resized by torch in uint8" in str(pictures(root, **way).protocol()["decoding"]) for way in WAYS]
    assert named == [way == {"cache": "pixels"} for way in WAYS]


def test_another_augmentation_is_refused_with_a_remedy(root: Path) -> None:
    with pytest.raises(
        ValueError, match=r"augmentation is batched, and only exact exists: remove .* --cache pixels"
    ):
        pictures(root, augmentation="batched")


def test_clip_shows_test_views_in_training(root: Path) -> None:
    data = pictures(root, transforms="clip", cache="pixels")
    views = [
        sorted(image.sum().item() for image in served(loader)[0])
        for loader in (data.train_dataloader(), data.plain_dataloader())
    ]
    assert views[0] == views[1]


class Seeing(LinearProbe):
    """Keeps the training images that it gets."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.seen: list[Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append(batch[0])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16)])
def test_a_run_trains_on_loaded_images_in_its_precision(
    root: Path, way: dict[str, Any], precision: Any, dtype: torch.dtype
) -> None:
    tiny = dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1)
    strategy = Seeing(Backbone("vision_transformer", weights="random", options=tiny))
    data = pictures(root, num_workers=2, **way)
    StreamTrainer(max_epochs=1, accelerator="cpu", precision=precision).run(strategy, data)
    expected, _ = served(pictures(root, **way).train_dataloader())
    assert torch.equal(torch.cat(strategy.seen[-3:]), expected.to(dtype))


def test_a_result_holds_the_hash_of_the_scanned_files(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    tiny = dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1)
    found = []
    for _ in range(2):
        strategy = NearestClassMean(Backbone("vision_transformer", weights="random", options=tiny))
        data = pictures(tmp_path, num_experiences=1)
        result = StreamTrainer(max_epochs=1, accelerator="cpu").run(strategy, data)
        found.append((result.provenance["images_sha256"], result.protocol.fingerprint))
        variant = Variant("transforms inflora", 24, 8, CLASSES, "a" * 64, "b" * 64, "c" * 64)
        manifest.write(tmp_path, "pictures", [], [variant])
    assert [sha256 for sha256, _ in found] == [None, "c" * 64]
    assert found[0][1] == found[1][1]


def test_files_that_changed_since_they_were_prepared_are_named_before_training(
    root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    files = sorted(path.name for path in root.glob("*.png"))
    variant = Variant("transforms inflora", 24, 8, CLASSES, "a" * 64, "b" * 64, "c" * 64)
    manifest.write(tmp_path, "pictures", scan(tmp_path, files), [variant])
    pictures(tmp_path)
    (tmp_path / "1-7.png").write_bytes((tmp_path / "1-7.png").read_bytes()[:-20])
    pictures(tmp_path, val_fraction=0.2)  # opens no test image
    with pytest.raises(ValueError, match=r"1-7\.png below .* is not the file that .*: fetch the data with"):
        pictures(tmp_path)


def test_without_a_manifest_unreadable_files_are_named_before_training(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    (tmp_path / "1-2.png").write_bytes((tmp_path / "1-2.png").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"1 of 24 images below .* cannot be read, such as 1-2\.png"):
        pictures(tmp_path)


def test_the_folder_of_the_cache_is_not_part_of_the_cell() -> None:
    arguments = resolve(layers("ncm", "imagenet_r"), ["--cache_dir", "here"]).cell["data"]["init_args"]
    assert arguments["cache"] == "none"
    assert "cache_dir" not in arguments
