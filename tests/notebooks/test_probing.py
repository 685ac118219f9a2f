from __future__ import annotations

import pytest
import torch
from pretraining.probing import linear_probe_accuracy, nearest_mean_accuracy, table

from cl_bench.data.sources import ArraySource, Sources
from datamodules.digits import Digits

SOURCES = Digits.sources


def blobs(seed: int, images: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Class 0 around zero and class 1 on a ring around it, so that their means coincide."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % 2
    directions = torch.nn.functional.normalize(torch.randn(images, 2, generator=generator))
    points = directions * (0.2 + 2 * labels)[:, None]
    return torch.cat([points, points.norm(dim=1, keepdim=True)], dim=1), labels


def test_a_linear_probe_separates_classes_if_a_feature_does() -> None:
    train, test = blobs(0), blobs(1)
    assert linear_probe_accuracy(train, test) == 100
    flat = (train[0][:, :2], train[1]), (test[0][:, :2], test[1])
    assert linear_probe_accuracy(*flat) < 75
    assert nearest_mean_accuracy(*flat) < 75


def test_features_that_no_seed_changes_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Digits, "sources", few_digits)
    found = table("digits", [], "embedded", [1, 2])
    assert {name: len(pairs) for name, pairs in found.items()} == {
        "random weights": 2,
        "embedded": 1,
        "raw pixels": 1,
    }


def few_digits(data: Digits) -> Sources:
    found = SOURCES(data)
    few = torch.arange(0, 200), torch.arange(0, 100)
    train, test = (
        ArraySource(source.images[chosen], [source.targets[i] for i in chosen.tolist()])
        for source, chosen in zip((found.train, found.test), few, strict=True)
        if isinstance(source, ArraySource)
    )
    return Sources(train=train, test=test, class_names=found.class_names)


def test_embedded_features_are_best_on_generated_data_of_each_seed() -> None:
    options = ["--num_classes=5", "--images_per_class=20", "--test_images_per_class=10"]
    found = table("fractals", options, "embedded", [1, 2])
    assert {len(pairs) for pairs in found.values()} == {2}
    for embedded, random, raw in zip(
        *(found[n] for n in ("embedded", "random weights", "raw pixels")), strict=True
    ):
        assert embedded[0] > random[0] + 5
        assert embedded[0] > raw[0] + 5


@pytest.mark.parametrize("accuracy", [nearest_mean_accuracy, linear_probe_accuracy])
def test_accuracy_on_random_labels_is_chance(accuracy: object) -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(400, 3, generator=generator), torch.arange(400) % 2
    assert callable(accuracy)
    assert 30 < accuracy((features[:200], labels[:200]), (features[200:], labels[200:])) < 70
