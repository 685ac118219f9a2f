from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cl_bench.data.published import imagenet100
from cl_bench.data.published.imagenet100 import VARIANTS, Classes
from datamodules.imagenet100 import ImageNet100


def imagenet(root: Path, **arguments: Any) -> ImageNet100:
    usual: dict[str, Any] = {"root": str(root), "num_experiences": 10, "image_size": 8}
    data = ImageNet100(**usual | arguments)
    data.setup()
    return data


@pytest.mark.parametrize("classes", VARIANTS)
def test_a_variant_is_served_from_a_root_of_more_classes(imagenet100_root: Path, classes: Classes) -> None:
    data = imagenet(imagenet100_root, classes=classes)
    assert data.class_names == imagenet100.wnids(classes)
    assert data.test_images == [1] * 100  # other files are ignored
    assert [len(indices) for indices in data.stream.train_indices] == [30] * 10
    assert data.variants == {"classes": classes, "transforms": "inflora"}


def test_variants_are_different_protocols(imagenet100_root: Path) -> None:
    protocols = {str(imagenet(imagenet100_root, classes=classes).protocol()) for classes in VARIANTS}
    assert len(protocols) == 3


def test_a_missing_class_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder .*/train/n01440764 has no image \*.JPEG: prepare"):
        imagenet(tmp_path)
