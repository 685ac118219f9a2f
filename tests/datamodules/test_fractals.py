from __future__ import annotations

from typing import Any

import pytest
import torch
from pretraining import scenes
from pretraining.scenes import random_scenes
from torch import Tensor
from torch.nn.functional import pad

from datamodules import fractals
from datamodules.fractals import Fractals, Pictures, Systems, random_systems


def images(number: int | None = None, *, train: bool = True, **arguments: Any) -> Tensor:
    sources = Fractals(image_size=24, **arguments).sources()
    source = sources.train if train else sources.test
    return torch.stack([source[index][0] for index in range(number or len(source))])


def test_an_image_is_a_function_of_its_class_and_number() -> None:
    small = images(num_classes=2, images_per_class=5)
    large = images(num_classes=3, images_per_class=40)
    assert torch.equal(small[:5], large[:5])
    assert torch.equal(small[5:], large[40:45])
    rendered_again = Pictures(size=24, variation=0.05, data_seed=0, split=0)
    assert torch.equal(large[:32], rendered_again.block(label=0, block=0))
    assert torch.equal(large[32:40], rendered_again.block(label=0, block=1)[:8])
    assert torch.equal(large[40:72], rendered_again.block(label=1, block=0))


def test_no_image_occurs_twice_in_training_and_test() -> None:
    train = images(num_classes=3, images_per_class=40)
    test = images(num_classes=3, test_images_per_class=40, train=False)
    assert len(torch.cat([train, test]).unique(dim=0)) == 240


def test_another_data_seed_is_another_dataset() -> None:
    assert not torch.equal(images(3, data_seed=0), images(3, data_seed=1))
    one, other = (Fractals(data_seed=seed).sources().train.fingerprint for seed in (0, 1))
    assert one != other


@pytest.mark.parametrize("changed", ["num_classes", "images_per_class", "image_size", "variation"])
def test_the_fingerprint_covers_all_that_images_depend_on(changed: str) -> None:
    assert Fractals(**{changed: 7}).sources().train.fingerprint != Fractals().sources().train.fingerprint


def test_no_class_belongs_to_the_pre_training(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[Systems]] = {"stream": [], "pre-training": []}

    def recording(name: str) -> Any:
        def draw(*arguments: Any, **keywords: Any) -> Systems:
            drawn[name].append(random_systems(*arguments, **keywords))
            return drawn[name][-1]

        return draw

    monkeypatch.setattr(fractals, "random_systems", recording("stream"))
    monkeypatch.setattr(scenes, "random_systems", recording("pre-training"))
    images(num_classes=12, images_per_class=1, data_seed=2)  # a seed that no other test has rendered
    for seed in range(8):
        random_scenes(4, 16, 2, torch.Generator().manual_seed(seed))
    assert [{int(r) for systems in kind for r in systems.reflections % 2} for kind in drawn.values()] == [
        {1},
        {0},
    ]


def test_a_hundred_experiences_are_dealt_without_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[Any] = []
    monkeypatch.setattr(Pictures, "block", lambda *arguments: rendered.append(arguments))
    data = Fractals(num_classes=1000, num_experiences=100, data_seed=3)
    data.setup()
    assert len(data.experiences) == 100
    assert rendered == []


@pytest.mark.parametrize("image_size", [8, 33])
def test_images_have_the_requested_size(image_size: int) -> None:
    data = Fractals(num_classes=2, num_experiences=1, images_per_class=3, image_size=image_size)
    data.setup()
    data.enter(data.experiences[0])
    batch, labels = next(iter(data.train_dataloader()))
    assert batch.shape == (6, 3, image_size, image_size)
    assert sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]


def test_training_shifts_an_image_by_up_to_an_eighth() -> None:
    data = Fractals(image_size=16)
    raw = data.sources().train[0][0]
    padded = pad(data.test_transform()(raw), [2] * 4, mode="replicate")
    possible = {padded[:, i : i + 16, j : j + 16].numpy().tobytes() for i in range(5) for j in range(5)}
    torch.manual_seed(0)
    views = {data.train_transform()(raw).numpy().tobytes() for _ in range(50)}
    assert views <= possible
    assert len(views) > 10


def test_a_test_image_is_the_picture_itself() -> None:
    data = Fractals(image_size=16)
    raw = data.sources().test[0][0]
    assert torch.equal((255 * data.test_transform()(raw)).round(), raw)


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="images_per_class is 0 and must be at least 1"):
        Fractals(images_per_class=0).setup()
