from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate, pad

from cl_bench.data.experience import Batch
from cl_bench.data.sources import ArraySource
from datamodules.digits import Digits


@cache
def digits() -> Digits:
    data = Digits()
    data.setup()
    return data


@cache
def sources() -> tuple[ArraySource, ArraySource]:
    found = digits().sources()
    assert isinstance(found.train, ArraySource)
    assert isinstance(found.test, ArraySource)
    return found.train, found.test


def all_of(*batches: Batch) -> Batch:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_five_experiences_of_two_digits_are_the_default() -> None:
    assert [list(experience.classes) for experience in digits().experiences] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
        [8, 9],
    ]


def test_the_first_four_fifths_of_each_class_are_for_training() -> None:
    ink, labels = load_digits(return_X_y=True)
    train, test = sources()
    assert len(train) + len(test) == 1797
    for digit in range(10):
        expected = torch.from_numpy(ink[labels == digit])
        found = torch.cat([s.images[torch.tensor(s.targets) == digit] for s in (train, test)])
        assert torch.equal(found[:, 0].flatten(1), (expected * 255 / 16).round().to(torch.uint8))
        assert train.targets.count(digit) == int(0.8 * len(expected))


def test_every_channel_shows_the_digit() -> None:
    for source in sources():
        assert torch.equal(source.images, source.images[:, :1].expand(-1, 3, -1, -1))


def test_the_split_depends_on_no_seed() -> None:
    other = Digits(seed=7, order="numpy:3")
    other.setup()
    assert other.protocol() == digits().protocol()


def test_a_test_image_is_the_enlarged_digit() -> None:
    raw = sources()[1].images[3]
    expected = interpolate(raw[None].float(), size=(32, 32), mode="bilinear", antialias=True)[0] / 255
    torch.testing.assert_close(digits().test_transform()(raw), expected, atol=1 / 255, rtol=0)


def crops(image: Tensor, margin: int) -> list[Tensor]:
    """Every crop of the original size out of ``image`` (3, H, W) with a black margin."""
    size, padded = image.shape[-1], pad(image, [margin] * 4)
    offsets = range(2 * margin + 1)
    return [padded[:, i : i + size, j : j + size] for i in offsets for j in offsets]


def test_training_shifts_a_digit_by_up_to_an_eighth() -> None:
    raw = sources()[0].images[5]
    torch.manual_seed(0)
    possible = {crop.numpy().tobytes() for crop in crops(digits().test_transform()(raw), margin=4)}
    views = {digits().train_transform()(raw).numpy().tobytes() for _ in range(50)}
    assert views <= possible
    assert len(views) > 20


@pytest.mark.parametrize("image_size", [8, 20])
def test_images_have_the_requested_size(image_size: int) -> None:
    raw = sources()[0].images[0]
    data = Digits(image_size=image_size)
    assert (
        data.train_transform()(raw).shape == data.test_transform()(raw).shape == (3, image_size, image_size)
    )


def test_the_nearest_class_mean_of_the_pixels_recognises_the_digits() -> None:
    data = Digits(num_experiences=1, order="numpy:1993")
    data.setup()
    data.enter(data.experiences[0])
    images, labels = all_of(*data.plain_dataloader())
    means = torch.stack([images[labels == position].mean(dim=0).flatten() for position in range(10)])
    images, labels = all_of(*data.test_dataloader())
    predicted = torch.cdist(images.flatten(1), means).argmin(dim=1)
    accuracy = np.mean((predicted == labels).numpy())
    assert accuracy > 0.8
