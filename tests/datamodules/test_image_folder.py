from __future__ import annotations

import hashlib
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cl_bench.data.experience import Batch
from datamodules.image_folder import ImageFolder

# The images of a class show only its colour.
COLOURS = {"Zebra": (250, 0, 0), "ant": (0, 250, 0), "über": (0, 0, 250), "bee": (250, 250, 0)}
BYTE_ORDER = ["Zebra", "ant", "bee", "über"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three training images and two test images of each class, 12 × 10 pixels."""
    folder = tmp_path / "insects"
    for split, number in (("train", 3), ("test", 2)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for index in range(number):
                Image.new("RGB", (12, 10), colour).save(folder / split / name / f"{index}.png")
    return folder


def image_folder(root: Path | str, **arguments: Any) -> ImageFolder:
    usual: dict[str, Any] = {"num_experiences": 2, "image_size": 8}
    data = ImageFolder(root=str(root), **usual | arguments)
    data.setup()
    data.enter(data.experiences[-1])
    return data


def all_of(*batches: Batch) -> Batch:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def colours(images: Tensor) -> list[tuple[int, ...]]:
    """The colour of images (B, 3, H, W) of a single colour each."""
    assert (images == images[:, :, :1, :1]).all()
    return [tuple(colour) for colour in (255 * images[:, :, 0, 0]).round().int().tolist()]


def test_classes_are_in_byte_order(root: Path) -> None:
    assert image_folder(root).class_names == BYTE_ORDER


def test_every_image_is_served_with_the_position_of_its_class(root: Path) -> None:
    data = image_folder(root, order=[3, 1, 0, 2])
    assert data.class_names == ["über", "ant", "Zebra", "bee"]
    images, labels = all_of(*data.test_dataloader())
    assert colours(images) == [COLOURS[data.class_names[label]] for label in labels]
    assert labels.bincount().tolist() == data.test_images == [2, 2, 2, 2]
    images, labels = all_of(*data.train_dataloader())
    assert colours(images) == [COLOURS[data.class_names[label]] for label in labels]
    assert labels.bincount().tolist() == [0, 0, 3, 3]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(root: Path, mode: str) -> None:
    grey = Image.new("RGB", (12, 10), (255, 255, 255)).convert(mode)
    grey.save(root / "test" / "ant" / "0.tif")
    (root / "test" / "ant" / "0.png").unlink()
    images, labels = all_of(*image_folder(root).test_dataloader())
    assert colours(images[labels == 1]) == [(255, 255, 255), COLOURS["ant"]]


def test_test_images_are_resized_by_the_short_side_and_cropped_in_the_centre() -> None:
    columns = np.arange(64, dtype=np.uint8)[None, :, None] + 100
    image = Image.fromarray(np.broadcast_to(columns, (32, 64, 3)))
    view = ImageFolder(image_size=28, test_resize=32).test_transform()(image)
    assert view.shape == (3, 28, 28)
    # 32 is the short side already: columns 18 to 45 are the centre.
    assert ((255 * view[0, 0]).round() == torch.arange(118, 146)).all()


def test_the_default_resize_is_that_of_256_to_224() -> None:
    text = repr(ImageFolder(image_size=224).test_transform())
    assert "Resize(size=[256]" in text
    assert "CenterCrop(size=(224, 224)" in text


def test_training_crops_the_requested_share() -> None:
    # The red channel counts columns and the green one rows, so a view shows which part it covers.
    ramp = np.arange(256, dtype=np.uint8)
    pixels = np.stack(
        [np.tile(ramp, (256, 1)), np.tile(ramp[:, None], (1, 256)), np.zeros((256, 256), np.uint8)], 2
    )
    image = Image.fromarray(pixels)
    torch.manual_seed(0)
    for scale in ((0.1, 0.2), (0.5, 0.6)):
        transform = ImageFolder(image_size=32, train_scale=scale).train_transform()
        for _ in range(20):
            view = 255 * transform(image)
            width = view[0].max() - view[0].min()
            height = view[1].max() - view[1].min()
            assert scale[0] * 0.85 < width * height / 256**2 < scale[1] * 1.05


def test_training_mirrors_half_of_the_images() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 4:] = 255
    torch.manual_seed(0)
    transform = ImageFolder(image_size=8, train_scale=(1.0, 1.0)).train_transform()
    mirrored = [
        bool(view[0, 0, 0] > view[0, 0, -1])
        for view in (transform(Image.fromarray(pixels)) for _ in range(100))
    ]
    assert 30 < sum(mirrored) < 70


def test_the_fingerprint_is_the_hash_of_the_file_list(root: Path) -> None:
    lines = sorted(f"test/{name}/{index}.png".encode() for name in COLOURS for index in range(2))
    protocol = image_folder(root).protocol()
    assert protocol["test_images"] == hashlib.sha256(b"\n".join(lines)).hexdigest()


def test_moving_the_folder_leaves_the_protocol_equal(root: Path) -> None:
    before = image_folder(root, name="mine").protocol()
    assert str(root.parent) not in str(before)
    moved = shutil.move(root, root.parent / "elsewhere")
    assert image_folder(moved, name="mine").protocol() == before


def test_a_renamed_file_is_another_protocol(root: Path) -> None:
    before = image_folder(root).protocol()
    (root / "train" / "ant" / "0.png").rename(root / "train" / "ant" / "00.png")
    after = image_folder(root).protocol()
    assert {key for key in before if before[key] != after[key]} == {"train_images"}


@pytest.mark.parametrize(
    "arguments",
    [
        {"train_scale": (0.5, 1.0)},
        {"train_interpolation": "bicubic"},
        {"test_interpolation": "bicubic"},
        {"test_resize": 8},
        {"max_train_per_class": 2},
        {"max_test_per_class": 1},
    ],
)
def test_a_setting_of_the_images_is_another_protocol(root: Path, arguments: dict[str, Any]) -> None:
    assert image_folder(root).protocol() != image_folder(root, **arguments).protocol()


def test_a_limit_takes_the_first_files_by_name(root: Path) -> None:
    for split in ("train", "test"):
        Image.new("RGB", (12, 10), (1, 2, 3)).save(root / split / "ant" / "-first.png")
    data = image_folder(root, max_train_per_class=1, max_test_per_class=1, order=[0, 2, 3, 1])
    assert data.test_images == [1, 1, 1, 1]
    for loader in (data.plain_dataloader(), data.test_dataloader()):
        images, labels = all_of(*loader)
        assert colours(images[labels == 3]) == [(1, 2, 3)]


def test_the_dataset_is_named_after_its_folder(root: Path) -> None:
    assert ImageFolder(root=f"{root}/").name == "insects"
    assert ImageFolder(root=str(root), name="mine").name == "mine"


def test_names_that_begin_with_a_dot_are_ignored(root: Path) -> None:
    before = image_folder(root).protocol()
    (root / "train" / ".cache").mkdir()
    (root / "train" / "ant" / ".thumbnail.png").touch()
    (root / "train" / "ant" / "notes.txt").touch()
    assert image_folder(root).protocol() == before


def test_a_missing_option_root_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ValueError, match="No root is given: set --root"):
        image_folder("")


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"The folder {tmp_path}/nowhere does not exist: set --root"):
        image_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split_is_named(root: Path, split: str) -> None:
    shutil.rmtree(root / split)
    with pytest.raises(FileNotFoundError, match=f"The folder {root}/{split} does not exist"):
        image_folder(root)


def test_a_split_without_classes_is_named(root: Path) -> None:
    shutil.rmtree(root / "test")
    (root / "test").mkdir()
    with pytest.raises(ValueError, match=f"The folder {root}/test has no classes"):
        image_folder(root)


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_class_folder_is_named(root: Path, split: str) -> None:
    for image in (root / split / "bee").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match=f"The class folder {root}/{split}/bee is empty"):
        image_folder(root)


@pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
def test_a_class_in_one_split_only_is_named(root: Path, split: str, other: str) -> None:
    shutil.rmtree(root / other / "bee")
    with pytest.raises(ValueError, match=f"The class bee of {root} is in {split} but not in {other}"):
        image_folder(root)


def test_a_class_folder_without_a_known_extension_is_named(root: Path) -> None:
    for image in (root / "train" / "bee").iterdir():
        image.rename(image.with_suffix(".xyz"))
    with pytest.raises(
        ValueError, match=rf"None of the 3 files in the class folder {root}/train/bee .* \.jpeg"
    ):
        image_folder(root)


def broken_chunk() -> bytes:
    """A PNG file whose second block of pixels has lost its name."""
    noise = np.random.RandomState(0).randint(256, size=(200, 200, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "png")
    before, name, after = buffer.getvalue().rpartition(b"IDAT")
    assert before.count(name) == 1
    return before + b"\0\1??" + after


# Pillow raises another error for each of these.
DAMAGED = {"text": b"no image", "cut": broken_chunk()[:2000], "chunk": broken_chunk(), "header": b"P6\n4 "}


@pytest.mark.parametrize("damage", ["text", "cut", "header"])
def test_an_unreadable_image_is_named_before_training(root: Path, damage: str) -> None:
    (root / "train" / "bee" / "1.png").write_bytes(DAMAGED[damage])
    with pytest.raises(ValueError, match=r"1 of 12 images below .* cannot be read, such as train/bee/1\.png"):
        image_folder(root)


def test_damage_that_only_decoding_shows_is_named_when_the_image_is_decoded(root: Path) -> None:
    path = root / "train" / "bee" / "1.png"
    path.write_bytes(DAMAGED["chunk"])
    data = image_folder(root, order=[0, 1, 3, 2])
    with pytest.raises(ValueError, match=f"The image {path} cannot be read"):
        all_of(*data.train_dataloader())


def test_validation_reads_no_test_image_in_advance(root: Path) -> None:
    (root / "test" / "bee" / "1.png").write_bytes(DAMAGED["text"])
    image_folder(root, val_fraction=0.4)
    with pytest.raises(ValueError, match=r"1 of 8 images below .* cannot be read, such as test/bee/1\.png"):
        image_folder(root)


def test_an_image_too_large_to_decode_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(
        ValueError, match=r"12 of 12 images below .* \(Image size \(120 pixels\) exceeds limit"
    ):
        image_folder(root)


def test_one_line_counts_what_was_taken(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_folder(root)
    assert capsys.readouterr().err == (
        f"{root}: 12 training and 8 test images of 4 classes; nothing left out\n"
    )


def test_one_line_names_what_was_left_out(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ant = root / "train" / "ant"
    for name in ("x.jfif", "y.AVIF", "z.jp2", "notes"):
        shutil.copy(ant / "0.png", ant / name)
    for folder in ("more/of/it", "more/.hidden"):
        (ant / folder).mkdir(parents=True)
        shutil.copy(ant / "0.png", ant / folder / "0.png")
    shutil.copy(ant / "0.png", root / "test" / "stray.png")
    image_folder(root, max_train_per_class=2)
    assert capsys.readouterr().err == (
        f"{root}: 8 training and 8 test images of 4 classes; left out: 4 images beyond the limit of a class; "
        "4 files of other kinds (.avif, .jfif, .jp2, no extension); 2 images outside of the class folders, "
        "such as train/ant/more/of/it/0.png\n"
    )


def test_a_class_matches_its_other_unicode_spelling(root: Path) -> None:
    before = image_folder(root)
    (root / "test" / "über").rename(root / "test" / "u\u0308ber")
    after = image_folder(root)
    assert after.class_names == before.class_names
    images, labels = all_of(*after.test_dataloader())
    assert colours(images) == [COLOURS[after.class_names[label]] for label in labels]


def test_two_spellings_of_a_class_in_one_split_are_refused(root: Path) -> None:
    shutil.copytree(root / "train" / "über", root / "train" / "u\u0308ber")
    with pytest.raises(
        ValueError, match=r"has the class über in two spellings, 'u\\u0308ber' and '\\xfcber'"
    ):
        image_folder(root)


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.9, 0.1), (0.5, 1.5)])
def test_an_impossible_crop_is_refused(root: Path, scale: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="train_scale is"):
        image_folder(root, train_scale=scale)


def test_a_resize_below_the_crop_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="set test_resize to 8 or more"):
        image_folder(root, test_resize=7)


@pytest.mark.parametrize("limit", ["max_train_per_class", "max_test_per_class"])
def test_a_limit_of_zero_images_is_refused(root: Path, limit: str) -> None:
    with pytest.raises(ValueError, match="cannot be limited to 0 images"):
        image_folder(root, **{limit: 0})
