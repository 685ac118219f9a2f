from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from cl_bench.data.draws import Draw, DrawnImages, DrawSampler
from cl_bench.data.experience import Batch, Experience
from cl_bench.data.loading import StreamLoader
from cl_bench.data.sources import ArraySource, Sources
from cl_bench.data.stream import Transform
from datamodules.toy import Toy

ORDER = [4, 2, 0, 5, 1, 3]


def toy(index: int | None = None, **arguments: Any) -> Toy:
    """Toy data in the order above, dealt, with experience ``index`` entered."""
    usual: dict[str, Any] = {"num_experiences": 3, "order": ORDER, "batch_size": 10}
    data = Toy(**usual | arguments)
    data.setup()
    if index is not None:
        data.enter(data.experiences[index])
    return data


def sampler(loader: Iterable[Batch]) -> DrawSampler:
    assert isinstance(loader, StreamLoader)
    found = loader.batches.sampler
    assert isinstance(found, DrawSampler)
    return found


def served(loader: Iterable[Batch], epoch: int = 0) -> Batch:
    """Everything a loader yields in one epoch."""
    assert isinstance(loader, DataLoader)
    sampler(loader).set_epoch(epoch)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def multiset(images: Tensor) -> list[bytes]:
    return sorted(image.numpy().tobytes() for image in images)


def test_a_batch_is_float_images_and_positions() -> None:
    images, labels = next(iter(toy(0).train_dataloader()))
    assert images.shape == (10, 3, 16, 16)
    assert images.dtype == torch.float32
    assert labels.shape == (10,)
    assert labels.dtype == torch.int64
    assert 0 <= images.min() < images.max() <= 1


@pytest.mark.parametrize("index", [0, 1, 2])
def test_images_carry_the_position_of_their_class(index: int) -> None:
    data = toy(index)
    source = data.sources().train
    assert isinstance(source, ArraySource)
    images, labels = served(data.plain_dataloader())
    pixels = (255 * images).round().to(torch.uint8)
    assert set(labels.tolist()) == set(data.experiences[index].classes)
    for position in data.experiences[index].classes:
        of_class = torch.tensor(source.targets) == ORDER[position]
        assert multiset(pixels[labels == position]) == multiset(source.images[of_class])


@pytest.mark.parametrize("index", [0, 1, 2])
def test_loaders_serve_the_images_that_were_dealt(index: int) -> None:
    data = toy(index)
    for loader in (data.train_dataloader(), data.plain_dataloader(), data.augmented_dataloader(0)):
        assert set(sampler(loader).indices) == set(data.stream.train_indices[index])
        assert len(served(loader)[1]) == len(data.stream.train_indices[index])
    seen = np.concatenate(data.stream.test_indices[: index + 1])
    test = data.test_dataloader()
    assert set(sampler(test).indices) == set(seen)
    assert len(served(test)[1]) == len(seen)


def test_the_test_loader_counts_as_announced() -> None:
    data = toy(2, test_images_per_class=4)
    _, labels = served(data.test_dataloader())
    assert labels.bincount().tolist() == data.test_images == [4] * 6


def test_one_experience_of_all_classes_serves_every_image() -> None:
    data = toy()
    data.enter(Experience(0, 1, range(6)))
    assert len(served(data.train_dataloader())[1]) == 6 * data.images_per_class
    assert len(served(data.test_dataloader())[1]) == 6 * data.test_images_per_class


def test_class_names_follow_the_order() -> None:
    data = toy()
    assert data.class_names == [f"spot {label}" for label in ORDER]
    names = [name for experience in data.experiences for name in experience.class_names]
    assert names == data.class_names


def test_test_batches_are_twice_as_large_unless_given() -> None:
    assert len(next(iter(toy(1, test_images_per_class=12).test_dataloader()))[1]) == 20
    assert len(next(iter(toy(1, test_batch_size=3).test_dataloader()))[1]) == 3


def test_later_experiences_serve_the_same_test_batches_before_their_own() -> None:
    first, second = (list(toy(index, test_batch_size=5).test_dataloader()) for index in (0, 1))
    assert [len(labels) for _, labels in first] == [5, 5, 2]
    assert [len(labels) for _, labels in second] == [5, 5, 2, 5, 5, 2]
    assert all(equal(one, other) for one, other in zip(first, second, strict=False))


@pytest.mark.parametrize("workers", (0, 2))
def test_images_of_blank_batches_are_not_loaded(workers: int) -> None:
    data = toy(1, test_batch_size=5, num_workers=workers)
    whole = list(toy(1, test_batch_size=5).test_dataloader())
    data.blank_test_batches = 3
    blank = list(data.test_dataloader())
    data.close()
    assert [images.numel() for images, _ in blank[:3]] == [0, 0, 0]
    assert all(map(torch.equal, (labels for _, labels in blank), (labels for _, labels in whole)))
    assert all(equal(one, other) for one, other in zip(blank[3:], whole[3:], strict=True))


LOADERS: list[Callable[[Toy], DataLoader[Batch]]] = [
    Toy.train_dataloader,
    Toy.test_dataloader,
    Toy.plain_dataloader,
    lambda data: data.augmented_dataloader(1),
]


@pytest.mark.parametrize("loader", LOADERS)
def test_workers_change_no_batch(loader: Callable[[Toy], DataLoader[Batch]]) -> None:
    single, several = loader(toy(1)), loader(toy(1, num_workers=2))
    assert all(equal(one, other) for one, other in zip(single, several, strict=True))


@pytest.mark.parametrize("loader", LOADERS)
def test_loading_leaves_the_global_generators_untouched(loader: Callable[[Toy], DataLoader[Batch]]) -> None:
    data = toy(1)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    served(loader(data))
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_equal(np.random.get_state(), numpy_state)


@pytest.mark.parametrize("loader", LOADERS)
def test_the_global_generators_change_no_batch(loader: Callable[[Toy], DataLoader[Batch]]) -> None:
    data = toy(1)
    torch.manual_seed(1)
    one = served(loader(data))
    torch.manual_seed(2)
    assert equal(one, served(loader(data)))


def test_another_epoch_has_another_order_and_other_augmentations() -> None:
    data = toy(0)
    first, second = (served(data.train_dataloader(), epoch) for epoch in (0, 1))
    assert not torch.equal(first[1], second[1])
    assert multiset(first[0]) != multiset(second[0])
    assert equal(first, served(data.train_dataloader(), epoch=0))


def test_another_pass_has_other_augmentations_in_the_same_order() -> None:
    data = toy(0)
    first, second = (served(data.augmented_dataloader(index)) for index in (0, 1))
    assert torch.equal(first[1], second[1])
    assert multiset(first[0]) != multiset(second[0])
    assert multiset(first[0]) != multiset(served(data.train_dataloader())[0])


def test_another_seed_has_another_order_and_other_augmentations() -> None:
    first, second = (served(toy(0, seed=seed).train_dataloader()) for seed in (0, 1))
    assert not torch.equal(first[1], second[1])
    assert multiset(first[0]) != multiset(second[0])


def test_the_batch_size_changes_no_image() -> None:
    assert equal(served(toy(1).train_dataloader()), served(toy(1, batch_size=7).train_dataloader()))


def test_an_images_draw_does_not_depend_on_the_shuffle() -> None:
    indices = np.array([5, 9, 2, 7])
    shuffled, unshuffled = (DrawSampler(indices, (1, 2, 3), shuffle=shuffle) for shuffle in (True, False))
    assert list(shuffled) != list(unshuffled)
    assert sorted(shuffled) == sorted(unshuffled)


def test_no_two_passes_share_a_draw() -> None:
    data = toy()
    passes: list[list[Draw]] = []
    for experience in data.experiences:
        data.enter(experience)
        train = sampler(data.train_dataloader())
        for epoch in range(3):
            train.set_epoch(epoch)
            passes.append(list(train))
        others = [data.augmented_dataloader(index) for index in range(3)]
        passes += [
            list(sampler(loader)) for loader in (*others, data.plain_dataloader(), data.test_dataloader())
        ]
    seeds = [draw.seed for draws in passes for draw in draws]
    assert len(passes) == 3 * 8
    assert len(set(seeds)) == len(seeds)


def test_a_failing_transform_leaves_the_generator_as_it_was() -> None:
    def failing(image: Tensor) -> Tensor:
        raise ValueError(f"no {torch.rand(1)} today")

    images = DrawnImages(ArraySource(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), [0]), [0], failing)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="today"):
        images[Draw(0, 1)]
    assert torch.equal(torch.get_rng_state(), state)


class Recorder(LightningModule):
    """Keeps the batches of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs: list[list[Tensor]] = []

    def on_train_epoch_start(self) -> None:
        self.epochs.append([])

    def training_step(self, batch: Batch) -> Tensor:
        self.epochs[-1].append(batch[0])
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters())


def test_lightning_moves_the_epoch() -> None:
    data, recorder = toy(1), Recorder()
    stream = data.stream
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(recorder, datamodule=data)
    assert data.stream is stream
    for epoch, images in enumerate(recorder.epochs):
        assert torch.equal(torch.cat(images), served(data.train_dataloader(), epoch)[0])


def test_the_constructor_leaves_errors_to_setup() -> None:
    wrong = Toy(num_experiences=4, order="numpi:3", batch_size=0, seed=-1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        wrong.setup()


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"num_experiences": 4}, "6 classes cannot be dealt evenly into 4 experiences"),
        ({"num_experiences": None}, "The number or the size of the experiences is missing"),
        ({"order": "numpi:3"}, "did you mean numpy:3"),
        ({"order": [0, 1]}, "lacks 2, 3, 4, 5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"test_batch_size": 0}, "test_batch_size is 0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"num_workers": 10**6}, "num_workers is 1000000, and each is a process: choose 256 or fewer"),
        ({"seed": -1}, "seed is -1"),
        ({"held_out_classes": -1}, "held_out_classes is -1"),
        ({"held_out_classes": 6}, "held_out_classes is 6 of 6 classes: leave at least one"),
        ({"held_out_classes": 2, "order": "identity"}, "4 classes cannot be dealt evenly into 3 experiences"),
    ],
)
def test_setup_refuses_what_cannot_be_used(arguments: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        toy(**arguments)


def test_nothing_is_served_before_setup_and_enter() -> None:
    with pytest.raises(RuntimeError, match=r"setup\(\)"):
        _ = Toy(num_experiences=2).stream
    with pytest.raises(RuntimeError, match=r"enter\(experience\)"):
        toy().train_dataloader()


class NoData(Toy):
    def sources(self) -> Sources:
        raise FileNotFoundError("no data here")


def test_held_out_classes_are_the_last_ones_and_no_part_of_the_stream() -> None:
    whole = toy(num_classes=8, num_experiences=4, order="identity")
    data = toy(2, num_classes=8, held_out_classes=2)
    assert [data.experiences[-1].num_classes_seen, len(data.test_images)] == [6, 6]
    assert sorted(data.class_names) == [f"spot {label}" for label in range(6)]
    loaders = data.held_out_dataloaders()
    assert loaders is not None
    outside = multiset(served(loaders[0])[0])
    whole.enter(whole.experiences[3])
    assert outside == multiset(served(whole.plain_dataloader())[0])
    assert served(loaders[1])[1].tolist() == [0] * 6 + [1] * 6
    assert not set(outside) & set(multiset(served(data.test_dataloader())[0]))
    for index in range(3):
        data.enter(data.experiences[index])
        assert not set(outside) & set(multiset(served(data.plain_dataloader())[0]))


def test_the_first_32_images_of_a_held_out_class_are_served() -> None:
    data = toy(num_classes=8, held_out_classes=2, images_per_class=40, test_images_per_class=33)
    loaders = data.held_out_dataloaders()
    assert loaders is not None
    for loader in loaders:
        assert served(loader)[1].tolist() == [0] * 32 + [1] * 32


class OfTwoDomains(Toy):
    """Every other image is a sketch."""

    def sources(self) -> Sources:
        found = super().sources()
        places = [[index % 2 for index in range(len(part))] for part in (found.train, found.test)]
        return replace(found, domains=("photo", "sketch"), train_domains=places[0], test_domains=places[1])


def test_what_stays_in_the_stream_keeps_its_domains() -> None:
    whole, part = (
        OfTwoDomains(num_classes=number, num_experiences=3, test_images_per_class=5, **held)
        for number, held in ((9, {}), (9, {"held_out_classes": 3}))
    )
    for data in (whole, part):
        data.setup()
    kept = [counts[:6] for counts in whole.domain_images]
    assert part.domain_images == kept == [[3, 2, 3, 2, 3, 2], [2, 3, 2, 3, 2, 3]]


def test_nothing_is_held_out_unless_asked_for() -> None:
    assert toy().held_out_dataloaders() is None


def test_classes_held_out_make_another_protocol_even_if_the_stream_is_left_alike() -> None:
    alike = toy(num_classes=8, held_out_classes=2), toy(num_classes=9, held_out_classes=3)
    assert alike[0].class_names == alike[1].class_names
    for name in ("train_images", "test_images"):
        assert len({data.protocol()[name] for data in (*alike, toy())}) == 3


def test_the_length_of_the_stream_is_known_before_the_data() -> None:
    assert NoData(num_experiences=3).stream_length == 3
    assert NoData(num_classes_per_experience=[4, 2]).stream_length == 2
    assert Toy(num_classes_per_experience=3).stream_length == 2
    with pytest.raises(FileNotFoundError, match="no data here"):
        _ = NoData(num_classes_per_experience=3).stream_length
    with pytest.raises(ValueError, match="Both"):
        _ = NoData(num_experiences=3, num_classes_per_experience=3).stream_length


def test_what_is_no_part_of_the_protocol_leaves_it_equal() -> None:
    other = toy(order="identity", seed=3, num_workers=1, batch_size=2, num_experiences=2)
    assert toy().protocol() == other.protocol()


@pytest.mark.parametrize("arguments", [{"image_size": 15}, {"images_per_class": 5}, {"data_seed": 1}])
def test_other_images_are_another_protocol(arguments: dict[str, Any]) -> None:
    assert toy().protocol() != toy(**arguments).protocol()


class Described(Toy):
    description: Transform

    def train_transform(self) -> Transform:
        return self.description


def test_another_transform_is_another_protocol() -> None:
    class Scale:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __call__(self, image: Tensor) -> Tensor:
            return image * self.factor

        def __repr__(self) -> str:
            return f"Scale({self.factor})"

    protocols = []
    for factor in (1.0, 0.5):
        data = Described(num_experiences=2)
        data.description = Scale(factor)
        data.setup()
        protocols.append(data.protocol())
    changed = {key for key in protocols[0] if protocols[0][key] != protocols[1][key]}
    assert changed == {"train_transform"}


def test_a_transform_without_a_text_of_its_own_is_refused() -> None:
    data = Described(num_experiences=2)
    data.description = lambda image: image / 255
    data.setup()
    with pytest.raises(ValueError, match="text of the train transform holds a memory address"):
        data.protocol()


def test_the_protocol_is_plain_data() -> None:
    protocol = toy().protocol()
    assert json.loads(json.dumps(protocol)) == protocol
