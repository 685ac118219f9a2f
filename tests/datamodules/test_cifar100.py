from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from avalanche.benchmarks.classic import SplitCIFAR100
from torchvision import datasets

from cl_bench.data.published import cifar100
from cl_bench.data.stream import class_order
from datamodules.cifar100 import Cifar100


def cifar(root: Path, **arguments: Any) -> Cifar100:
    usual: dict[str, Any] = {"root": str(root), "num_experiences": 10, "image_size": 32}
    data = Cifar100(**usual | arguments)
    data.setup()
    return data


@pytest.fixture
def torchvision_accepts(monkeypatch: pytest.MonkeyPatch, cifar100_root: Path) -> None:
    """Let torchvision's checksums be those of the small files."""
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", cifar100.MD5["train"]]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", cifar100.MD5["test"]]])
    meta = datasets.CIFAR100.meta | {"md5": cifar100.MD5["meta"]}
    monkeypatch.setattr(datasets.CIFAR100, "meta", meta)


@pytest.mark.usefixtures("torchvision_accepts")
def test_images_labels_and_names_are_those_of_torchvision(cifar100_root: Path) -> None:
    sources = cifar(cifar100_root).sources()
    for source, train in ((sources.train, True), (sources.test, False)):
        theirs = datasets.CIFAR100(str(cifar100_root), train=train)
        assert len(source) == len(theirs)
        for index in range(len(source)):
            (image, label), (expected, expected_label) = source[index], theirs[index]
            np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
            assert label == expected_label
    assert sources.class_names == theirs.classes


@pytest.mark.usefixtures("torchvision_accepts")
@pytest.mark.parametrize("order", ["identity", "numpy:1993"])
def test_experiences_hold_the_images_of_avalanches_own_stream(cifar100_root: Path, order: str) -> None:
    data = cifar(cifar100_root, order=order)
    theirs = SplitCIFAR100(
        10,
        fixed_class_order=list(class_order(order, 100)),
        shuffle=False,
        dataset_root=cifar100_root,
        class_ids_from_zero_from_first_exp=True,
    )
    assert [
        indices.tolist() for indices in data.stream.train_indices
    ] == theirs.train_exps_patterns_assignment
    assert [indices.tolist() for indices in data.stream.test_indices] == theirs.test_exps_patterns_assignment
    for ours, experience in zip(data.experiences, theirs.train_stream, strict=True):
        assert sorted(experience.classes_in_this_experience) == list(ours.classes)


def test_labels_are_positions_in_the_published_order(cifar100_root: Path) -> None:
    data = cifar(cifar100_root, order="numpy:1993")
    assert data.class_names[:3] == ["class 68", "class 56", "class 78"]
    assert data.test_images == [2] * 100


def test_test_images_are_shown_whole_and_enlarged(cifar100_root: Path) -> None:
    data = cifar(cifar100_root, image_size=64)
    data.enter(data.experiences[0])
    images, _ = next(iter(data.test_dataloader()))
    assert images.shape[1:] == (3, 64, 64)
    assert "short_side=64" in str(data.protocol()["test_transform"])
