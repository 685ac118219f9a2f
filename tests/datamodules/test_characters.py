from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.ft2font import FT2Font
from scipy.ndimage import label
from torch.nn.functional import pad

from cl_bench.data.sources import ArraySource
from datamodules import characters
from datamodules.characters import LATIN, LATIN_FACES, OTHERS, UNICODE_FACES, Characters, drawn


def sources(**arguments: Any) -> tuple[ArraySource, ArraySource]:
    small = {"num_classes": 2, "images_per_class": 4, "test_images_per_class": 4, "image_size": 16}
    found = Characters(**small | arguments).sources()
    assert isinstance(found.train, ArraySource)
    assert isinstance(found.test, ArraySource)
    return found.train, found.test


def test_the_same_fonts_give_the_same_bits() -> None:
    data = Characters(num_classes=60, images_per_class=2, test_images_per_class=1)
    if data.decoding != "generated from fonts da3111cc, uint8 RGB":
        pytest.skip("matplotlib ships other font files than those of 3.11.2, for which the hash was recorded")
    found = data.sources()
    assert isinstance(found.train, ArraySource)
    assert hashlib.sha256(found.train.images.numpy().tobytes()).hexdigest()[:16] == "efd78bf13bb62924"


def test_a_larger_dataset_contains_a_smaller_one() -> None:
    small, small_test = sources()
    large, large_test = sources(num_classes=3, images_per_class=9, test_images_per_class=9)
    for few, many in ((small, large), (small_test, large_test)):
        assert torch.equal(few.images[:4], many.images[:4])
        assert torch.equal(few.images[4:], many.images[9:13])


def test_no_image_occurs_twice() -> None:
    both = torch.cat([source.images for source in sources(images_per_class=40, test_images_per_class=40)])
    assert len(both.unique(dim=0)) == len(both) == 160


def test_another_data_seed_is_another_dataset() -> None:
    assert sources()[0].fingerprint == sources()[0].fingerprint != sources(data_seed=1)[0].fingerprint


def test_every_face_holds_the_characters_that_it_is_used_for() -> None:
    assert len(set(LATIN + OTHERS)) == len(LATIN + OTHERS)
    for face in UNICODE_FACES + LATIN_FACES:
        held = FT2Font(str(characters._file(face))).get_charmap()
        needed = LATIN if face in LATIN_FACES else LATIN + OTHERS
        assert {ord(character) for character in needed} <= set(held), face


def test_no_two_characters_are_the_same_glyph_in_any_face() -> None:
    for face in UNICODE_FACES:
        glyphs = [characters._mask(face, character, 32).tobytes() for character in LATIN + OTHERS]
        assert len(set(glyphs)) == len(glyphs), face


def test_unseen_faces_are_not_trained_on() -> None:
    for character in ("A", "Ω"):
        data = Characters(unseen_faces=True)
        train, test = (set(data._faces(character, split)) for split in (0, 1))
        assert not train & test
        assert (
            train | test == set(Characters()._faces(character, 0)) == set(Characters()._faces(character, 1))
        )
    assert not torch.equal(sources(unseen_faces=True)[1].images, sources()[1].images)


def plain(masks: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """Draw the masks upright, in the middle, at an em of half the mask, black on white, without noise."""
    middle, black, white = 1 << 15, 0, (1 << 16) - 1
    words = np.full((len(masks), 32 + size**2), middle, dtype=np.int32)
    words[:, 0] = np.arange(len(masks)) * (1 << 16) // len(masks) + 1
    words[:, 18:21], words[:, 21:24] = white, white
    words[:, 24] = black
    words[:, 28] = white  # lines that neither rise nor run, and start where the first has ended
    return drawn(masks, words, size)


def test_a_letter_keeps_its_strokes_and_holes() -> None:
    for character, strokes, holes in (("B", 1, 2), ("A", 1, 1), ("i", 2, 0), ("T", 1, 0), ("O", 1, 1)):
        masks = np.stack([characters._mask("DejaVuSans-Bold", character, 96)])
        ink = plain(masks, 48)[0, 0] < 200
        assert label(ink, structure=np.ones((3, 3)))[1] == strokes
        assert label(~ink)[1] == 1 + holes  # and the ground


def test_a_third_of_the_ground_is_lines_a_little_darker_than_the_rest() -> None:
    words = np.full((1, 32 + 240**2), 1 << 15, dtype=np.int32)
    words[:, 24] = words[:, 28] = 0
    words[:, 26] = (1 << 16) - 1  # a line rises by a pixel a pixel
    ground = drawn(np.zeros((1, 480, 480), dtype=np.uint8), words, 240)[0]
    assert (ground == ground[..., :1]).all()  # and does not run, so lines are level
    line, rest = np.unique(ground)
    assert rest - line == 32  # the middle of 16 and 48
    (first,) = np.nonzero(np.diff((ground[0, :, 0] == line).astype(int)) == 1)
    assert set(np.diff(first)) == {42}  # the middle of a tenth and a quarter of the width
    assert (ground == line).mean() == pytest.approx(1 / 3, abs=0.02)


def test_ink_is_darker_than_its_ground() -> None:
    train, _ = sources(num_classes=20, images_per_class=20, image_size=32)
    brightness = train.images.float().mean(dim=1)
    middle, rim = brightness[:, 8:24, 8:24].mean(dim=(1, 2)), brightness[:, 0].mean(dim=1)
    assert (middle < rim + 16).float().mean() > 0.9


@pytest.mark.parametrize("image_size", [8, 33])
def test_images_have_the_requested_size(image_size: int) -> None:
    data = Characters(num_classes=2, num_experiences=1, images_per_class=3, image_size=image_size)
    data.setup()
    data.enter(data.experiences[0])
    batch, labels = next(iter(data.train_dataloader()))
    assert batch.shape == (6, 3, image_size, image_size)
    assert sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]


def test_training_shifts_an_image_by_up_to_an_eighth() -> None:
    data = Characters(image_size=16)
    raw = sources()[0].images[0]
    padded = pad(data.test_transform()(raw), [2] * 4, mode="replicate")
    possible = {padded[:, i : i + 16, j : j + 16].numpy().tobytes() for i in range(5) for j in range(5)}
    torch.manual_seed(0)
    views = {data.train_transform()(raw).numpy().tobytes() for _ in range(50)}
    assert views <= possible
    assert len(views) > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 141}, "num_classes is 141 and must be at least 1 and at most 140"),
        ({"images_per_class": 0}, "images_per_class is 0 and must be at least 1"),
        ({"data_seed": -1}, "data_seed is -1 and must be at least 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sources(**arguments)
