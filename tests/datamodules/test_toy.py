from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from cl_bench.data.sources import ArraySource
from cl_bench.run.configs import stems_of
from cl_bench.run.configuration import layers, resolve
from cl_bench.run.console import chance
from cl_bench.run.run import quiet, run
from datamodules.toy import Toy


def sources(**arguments: Any) -> tuple[ArraySource, ArraySource]:
    found = Toy(**arguments).sources()
    assert isinstance(found.train, ArraySource)
    assert isinstance(found.test, ArraySource)
    return found.train, found.test


def test_the_same_arguments_generate_the_same_pictures() -> None:
    for one, other in zip(sources(), sources(seed=5, num_experiences=2), strict=True):
        assert torch.equal(one.images, other.images)
        assert one.targets == other.targets


def test_another_data_seed_generates_other_pictures() -> None:
    assert not torch.equal(sources()[0].images, sources(data_seed=1)[0].images)


def test_every_class_has_the_requested_images() -> None:
    train, test = sources(num_classes=4, images_per_class=5, test_images_per_class=3, image_size=9)
    assert train.images.shape == (20, 3, 9, 9)
    assert test.images.shape == (12, 3, 9, 9)
    assert train.targets == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    assert test.targets == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


def class_means(images: Tensor, targets: list[int]) -> Tensor:
    labels = torch.tensor(targets)
    return torch.stack([images[labels == label].double().flatten(1).mean(dim=0) for label in labels.unique()])


@pytest.mark.parametrize("data_seed", range(3))
def test_the_nearest_class_mean_recognises_the_classes(data_seed: int) -> None:
    train, test = sources(data_seed=data_seed)
    means = class_means(train.images, train.targets)
    nearest = torch.cdist(test.images.double().flatten(1), means).argmin(dim=1)
    assert (nearest == torch.tensor(test.targets)).double().mean() > 0.9


def test_pictures_without_noise_show_the_pattern_of_their_class() -> None:
    train, test = sources(noise=0.0)
    for source in (train, test):
        patterns = [source.images[torch.tensor(source.targets) == label].unique(dim=0) for label in range(6)]
        assert [len(pattern) for pattern in patterns] == [1] * 6
        assert len(torch.cat(patterns).unique(dim=0)) == 6


def test_training_shifts_a_picture_by_up_to_a_pixel() -> None:
    data, raw = Toy(), sources()[0].images[0]
    padded = pad(data.test_transform()(raw), [1] * 4)
    possible = {padded[:, i : i + 16, j : j + 16].numpy().tobytes() for i in range(3) for j in range(3)}
    torch.manual_seed(0)
    assert {data.train_transform()(raw).numpy().tobytes() for _ in range(100)} == possible


def test_a_test_image_is_the_picture_itself() -> None:
    raw = sources()[0].images[0]
    assert torch.equal((255 * Toy().test_transform()(raw)).round(), raw)


QUICK = {"inflora", "janus_lora", "keeplora", "loda", "lora", "ncm"}
AT_CHANCE = {"bilora", "l2p"}  # their defaults need a pre-trained backbone; toy's has random weights
SMALL = {  # toy's backbone has two blocks, 32 wide
    "inflora_b5": ["--blocks=[0,1]"],
    "coda_prompt": ["--pool=30"],
    "ranpac": ["--random_features=200"],
}


@pytest.mark.parametrize(
    "stem",
    [
        pytest.param(stem, marks=() if stem in QUICK else pytest.mark.soak)
        for stem in stems_of("strategies")
        if stem not in AT_CHANCE
    ],
)
def test_every_method_ends_above_chance_with_the_default_settings(stem: str, tmp_path: Path) -> None:
    options = [*SMALL.get(stem, []), f"--results={tmp_path}", "--trainer.accelerator=cpu"]
    cell = resolve(layers(stem, "toy"), options)
    with quiet():
        assert chance(run(cell)) is None
