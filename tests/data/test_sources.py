from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from cl_bench.data.sources import (
    ArraySource,
    FileSource,
    PartSource,
    PixelSource,
    Source,
    Sources,
    held_out,
    require_files,
)
from datamodules.toy import Toy

TARGETS = [0] * 10 + [1] * 25 + [2] * 2


def test_a_file_is_decoded_when_it_is_read(tmp_path: Path) -> None:
    source = FileSource(tmp_path, ["a/1.png"], [3])
    (tmp_path / "a").mkdir()
    Image.new("L", (5, 4), 200).save(tmp_path / "a" / "1.png")
    image, label = source[0]
    assert (image.mode, image.size, image.getpixel((0, 0)), label) == ("RGB", (5, 4), (200, 200, 200), 3)


def test_pixels_in_memory_become_pillow_images() -> None:
    pixels = np.random.RandomState(0).randint(256, size=(2, 4, 5, 3), dtype=np.uint8)
    source = PixelSource(pixels, [1, 0])
    image, label = source[1]
    assert label == 0
    np.testing.assert_array_equal(np.asarray(image), pixels[1])


def pixel_source(pixels: npt.NDArray[np.uint8], targets: Sequence[int]) -> Source:
    return PixelSource(pixels, targets)


def array_source(pixels: npt.NDArray[np.uint8], targets: Sequence[int]) -> Source:
    return ArraySource(torch.from_numpy(pixels), targets)


@pytest.mark.parametrize("source", [pixel_source, array_source])
def test_a_fingerprint_distinguishes_pixels_labels_and_shapes(source: Callable[..., Source]) -> None:
    pixels = np.zeros((2, 4, 6, 3), dtype=np.uint8)
    other = pixels.copy()
    other[1, 3, 5, 2] = 1
    sources = [
        source(pixels, [0, 1]),
        source(other, [0, 1]),
        source(pixels, [1, 0]),
        source(pixels.reshape(2, 6, 4, 3), [0, 1]),
    ]
    assert len({source.fingerprint for source in sources}) == 4
    assert source(pixels.copy(), [0, 1]).fingerprint == sources[0].fingerprint


def test_missing_files_are_counted_and_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").touch()
    require_files(tmp_path, ["a/1.jpg"], "prepare again.")
    with pytest.raises(
        FileNotFoundError, match=r"2 of 3 images are missing below .*, such as a/2.jpg: prepare"
    ):
        require_files(tmp_path, ["a/1.jpg", "b/1.jpg", "a/2.jpg"], "prepare again.")


def test_a_share_of_every_class_is_held_out() -> None:
    kept, held = held_out(TARGETS, 0.2, seed=0)
    assert sorted([*kept, *held]) == list(range(len(TARGETS)))
    assert Counter(TARGETS[index] for index in held.tolist()) == {0: 2, 1: 5, 2: 1}


def test_one_image_of_a_class_is_kept_and_one_held_out() -> None:
    for fraction, expected in ((0.001, {0: 1, 1: 1, 2: 1}), (0.999, {0: 9, 1: 24, 2: 1})):
        _, held = held_out(TARGETS, fraction, seed=0)
        assert Counter(TARGETS[index] for index in held.tolist()) == expected


def test_the_seed_decides_which_images_are_held_out() -> None:
    chosen = [held_out(TARGETS, 0.2, seed)[1].tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_other_classes_do_not_change_the_choice() -> None:
    of_one_class = held_out(TARGETS[:10], 0.2, seed=0)[1]
    of_all = held_out(TARGETS, 0.2, seed=0)[1]
    assert of_one_class.tolist() == of_all[of_all < 10].tolist()


def test_a_class_of_one_image_is_refused() -> None:
    with pytest.raises(ValueError, match="Class 1 has a single training image"):
        held_out([0, 0, 1], 0.5, seed=0)


def test_a_part_has_its_images_and_a_fingerprint_of_its_own() -> None:
    whole = Toy().sources().train
    part = PartSource(whole, np.array([3, 1]))
    assert part.targets == [whole.targets[3], whole.targets[1]]
    assert bool((part[0][0] == whole[3][0]).all())
    fingerprints = {PartSource(whole, np.array(indices)).fingerprint for indices in ([3, 1], [1, 3], [1])}
    assert len(fingerprints | {whole.fingerprint}) == 4


class Watched(Toy):
    """Toy data that record which images are opened."""

    def sources(self) -> Sources:
        found = super().sources()
        self.opened: dict[str, list[int]] = {"train": [], "test": []}
        self.train_source, self.test_source = found.train, found.test
        return Sources(
            Recording(found.train, self.opened["train"]),
            Recording(found.test, self.opened["test"]),
            found.class_names,
        )


class Recording(ArraySource):
    def __init__(self, source: Source, opened: list[int]) -> None:
        assert isinstance(source, ArraySource)
        super().__init__(source.images, source.targets)
        self.opened = opened

    def __getitem__(self, index: int) -> tuple[Any, int]:
        self.opened.append(index)
        return super().__getitem__(index)


def opened(data: Watched) -> None:
    """Train on, measure and evaluate every experience."""
    data.setup()
    for experience in data.experiences:
        data.enter(experience)
        for loader in (
            data.train_dataloader(),
            data.plain_dataloader(),
            data.augmented_dataloader(0),
            data.test_dataloader(),
        ):
            assert len(list(loader)) > 0


def test_validation_opens_no_test_image() -> None:
    data = Watched(num_experiences=3, val_fraction=0.25)
    opened(data)
    assert data.opened["test"] == []
    assert set(data.opened["train"]) == set(range(6 * 12))
    assert data.test_images == [3] * 6


def test_validation_opens_no_test_image_of_held_out_classes() -> None:
    data = Watched(num_experiences=2, val_fraction=0.25, held_out_classes=2)
    opened(data)
    loaders = data.held_out_dataloaders()
    assert loaders is not None
    labels = [torch.cat([labels for _, labels in loader]).bincount().tolist() for loader in loaders]
    assert labels == [[9, 9], [3, 3]]
    assert data.opened["test"] == []


def test_held_out_images_are_evaluated_and_never_trained_on() -> None:
    data = Watched(num_experiences=1, val_fraction=0.25)
    data.setup()
    data.enter(data.experiences[0])
    seen = []
    for loader in (data.train_dataloader(), data.test_dataloader()):
        data.opened["train"].clear()
        assert len(list(loader)) > 0
        seen.append(set(data.opened["train"]))
    assert seen[0].isdisjoint(seen[1])
    assert (len(seen[0]), len(seen[1])) == (6 * 9, 6 * 3)


def test_only_the_evaluation_opens_test_images() -> None:
    data = Watched(num_experiences=3)
    data.setup()
    data.enter(data.experiences[0])
    for loader in (data.train_dataloader(), data.plain_dataloader(), data.augmented_dataloader(0)):
        assert len(list(loader)) > 0
    assert data.opened["test"] == []
    opened(data)
    assert set(data.opened["test"]) == set(range(6 * 6))


def test_every_fraction_and_choice_of_validation_images_is_a_protocol() -> None:
    protocols = []
    settings: list[dict[str, Any]] = [
        {},
        {"val_fraction": 0.25},
        {"val_fraction": 0.5},
        {"val_fraction": 0.25, "val_seed": 1},
    ]
    for arguments in settings:
        data = Toy(num_experiences=2, **arguments)
        data.setup()
        protocols.append(str(data.protocol()))
    assert len(set(protocols)) == 4
    assert "'evaluated_on': 'validation'" in protocols[1]


def test_all_seeds_and_orders_share_the_held_out_images() -> None:
    one, other = (
        Toy(num_experiences=2, val_fraction=0.25, seed=seed, order=order)
        for seed, order in ((0, "identity"), (1, "numpy:1993"))
    )
    one.setup()
    other.setup()
    assert one.protocol() == other.protocol()


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0])
def test_an_impossible_share_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"val_fraction is {fraction}"):
        Toy(num_experiences=2, val_fraction=fraction).setup()
