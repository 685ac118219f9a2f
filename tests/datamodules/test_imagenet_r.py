from __future__ import annotations

import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cl_bench.data.published import imagenet_r
from cl_bench.data.published.imagenet_r import SPLITS, Split
from cl_bench.data.sources import FileSource
from datamodules.imagenet_r import ImageNetR


@cache  # to look for all 30,000 files takes seconds
def imagenet(root: Path, **arguments: Any) -> ImageNetR:
    usual: dict[str, Any] = {"root": str(root), "num_experiences": 10, "image_size": 8}
    data = ImageNetR(**usual | arguments)
    data.setup()
    return data


@pytest.mark.parametrize("split", SPLITS)
def test_the_protocol_carries_the_hash_of_the_published_list(imagenet_r_root: Path, split: Split) -> None:
    protocol = imagenet(imagenet_r_root, split=split).protocol()
    assert protocol["train_images"] == imagenet_r.SHA256[split, "train"]
    assert protocol["test_images"] == imagenet_r.SHA256[split, "test"]
    assert protocol["variants"] == {"split": split, "label_order": "sorted", "transforms": "inflora"}


@pytest.mark.parametrize(("num_experiences", "size"), [(5, 40), (10, 20), (20, 10)])
def test_the_published_lengths_deal_every_class_and_image_once(
    imagenet_r_root: Path, num_experiences: int, size: int
) -> None:
    data = imagenet(imagenet_r_root, num_experiences=num_experiences, order="numpy:1993")
    assert [len(experience.classes) for experience in data.experiences] == [size] * num_experiences
    source = data.sources().train
    labels = np.asarray(source.targets)
    seen: list[int] = []
    for experience, indices in zip(data.experiences, data.stream.train_indices, strict=True):
        assert set(labels[indices]) == {data.stream.order[place] for place in experience.classes}
        seen += indices.tolist()
    assert sorted(seen) == list(range(24_000))


def test_seed_1993_deals_the_published_classes(imagenet_r_root: Path) -> None:
    data = imagenet(imagenet_r_root, order="numpy:1993")
    assert data.stream.order[:8] == (168, 136, 51, 9, 183, 101, 171, 99)
    sorted_ids = imagenet_r.wnids("sorted")
    assert data.class_names[:2] == [sorted_ids[168], sorted_ids[136]]


def test_every_image_has_the_label_of_its_folder(imagenet_r_root: Path) -> None:
    for label_order in ("sorted", "published"):
        data = imagenet(imagenet_r_root, label_order=label_order)
        source = data.sources().train
        assert isinstance(source, FileSource)
        wnids = imagenet_r.wnids(label_order)
        assert all(
            file.startswith(wnids[label]) for file, label in zip(source.files, source.targets, strict=True)
        )


def test_another_label_order_deals_other_experiences(imagenet_r_root: Path) -> None:
    classes = [
        set(imagenet(imagenet_r_root, label_order=label_order).class_names[:20])
        for label_order in ("sorted", "published")
    ]
    assert len(classes[0] & classes[1]) < 10


def test_test_images_are_counted_as_in_the_list(imagenet_r_root: Path) -> None:
    data = imagenet(imagenet_r_root)
    counts = Counter(file.partition("/")[0] for file in imagenet_r.split("coda")[1])
    assert data.test_images == [counts[name] for name in data.class_names]


def test_images_are_served_at_the_requested_size(imagenet_r_root: Path) -> None:
    data = imagenet(imagenet_r_root, batch_size=4)
    data.enter(data.experiences[9])
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 8, 8)
    assert set(labels.tolist()) <= set(range(180, 200))


def test_an_incomplete_root_names_a_missing_image(imagenet_r_root: Path, tmp_path: Path) -> None:
    (tmp_path / "imagenet-r").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"30,000 of 30,000 images are missing .* cl-bench prepare imagenet_r"
    ):
        imagenet(tmp_path)
    shutil.rmtree(tmp_path / "imagenet-r")
    with pytest.raises(FileNotFoundError, match=r"The folder .* does not exist: fetch"):
        imagenet(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="No root is given: fetch the data with cl-bench prepare imagenet_r"):
        ImageNetR(num_experiences=10).setup()
