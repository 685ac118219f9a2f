"""Generated images of characters, set in the fonts that matplotlib ships."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.ft2font import FT2Font, LoadFlags
from torchvision.transforms import v2

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.data.sources import ArraySource, Sources
from cl_bench.data.stream import Transform
from cl_bench.data.views import floats

LATIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghimnqrty23456789"
OTHERS = "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπσφψωБДЖИЦЧШЫЭЮЯЂЄЉЊѢб%&@#$€£¥§©¶?!+±÷=<>{}†‡«»*~ÆŒæœßÐÞŁŋɐəɣɥɮɲʁʃʊʎʒʔʘ"
"""Characters that no other of the list resembles in another size, such as o and O, or another alphabet."""

UNICODE_FACES = (
    *(
        f"DejaVu{family}{style}"
        for family, slanted in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
        for style in ("", "-Bold", f"-{slanted}", f"-Bold{slanted}")
    ),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
LATIN_FACES = ("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10")
"""Computer Modern: beyond letters and digits, its glyphs are not where Unicode has them."""

_UNSEEN_EVERY = (
    5  # one face of five, of every family and style, is kept for the test images if they have own faces
)
_TRAIN, _TEST = range(2)

_BITS = 12  # of the fraction of a coordinate
_ONE = 1 << _BITS
_FINE = 64  # of a pixel, in which the lines of the ground are placed
_SETTINGS = 32  # random words of an image before those of its noise

Pixels = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int32]


class Characters(StreamDataModule):
    """Images of letters, digits and symbols: a class is a character, its images are settings of it.

    Every image has a face, size, slant, tilt, place, colour, an uneven and ruled ground and noise of its own.
    What differs within a class is the same in all classes, so a network that learns to ignore it in one
    experience also sees better in the next. The embedded backbone has seen no ruled ground.

    An image depends only on the font files, ``data_seed``, its class and its number, so a dataset with more
    classes or more images contains the smaller one. Glyphs are drawn by FreeType without hinting, and
    everything after that is in integers: the same fonts give the same bits on every machine. Training shifts
    an image by up to an eighth of its width.

    Args:
        num_classes: Number of classes, at most 140: Latin letters and digits first, then Greek, Cyrillic and
            symbols.
        images_per_class: Training images of each class.
        test_images_per_class: Test images of each class.
        unseen_faces: Whether test images are set in faces that no training image has.
        data_seed: Seed of the images; each seed is another dataset.
        num_experiences: Number of equal experiences, T; null if num_classes_per_experience is given.
        image_size: Height and width of the images, in pixels.
        kwargs: As in every dataset.
    """

    name = "characters"

    def __init__(
        self,
        *,
        num_classes: int = 40,
        images_per_class: int = 40,
        test_images_per_class: int = 20,
        unseen_faces: bool = False,
        data_seed: int = 0,
        num_experiences: int | None = 5,
        image_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experiences=num_experiences, image_size=image_size, **kwargs)
        self.num_classes = num_classes
        self.images_per_class = images_per_class
        self.test_images_per_class = test_images_per_class
        self.unseen_faces = unseen_faces
        self.data_seed = data_seed
        self.decoding = f"generated from fonts {fonts_sha256()[:8]}, uint8 RGB"

    def sources(self) -> Sources:
        """Draw all images."""
        most = len(LATIN + OTHERS)
        for name, least, largest in (
            ("num_classes", 1, most),
            ("images_per_class", 1, None),
            ("test_images_per_class", 1, None),
            ("data_seed", 0, None),
        ):
            value = getattr(self, name)
            if value < least or (largest is not None and value > largest):
                limits = f"at least {least}" + ("" if largest is None else f" and at most {largest}")
                raise ValueError(f"{name} is {value} and must be {limits}: choose another number.")
        characters = (LATIN + OTHERS)[: self.num_classes]
        return Sources(
            train=self._drawn(characters, _TRAIN, self.images_per_class),
            test=self._drawn(characters, _TEST, self.test_images_per_class),
            class_names=list(characters),
        )

    def _drawn(self, characters: str, split: int, number: int) -> ArraySource:
        images = [
            drawn(
                _masks(self._faces(character, split), character, 2 * self.image_size),
                _words(number, _SETTINGS + self.image_size**2, (self.data_seed, label, split)),
                self.image_size,
            )
            for label, character in enumerate(characters)
        ]
        labels = np.repeat(np.arange(len(characters)), number)
        return ArraySource(torch.from_numpy(np.concatenate(images)), labels.tolist())

    def _faces(self, character: str, split: int) -> tuple[str, ...]:
        faces = UNICODE_FACES + (LATIN_FACES if character in LATIN else ())
        if not self.unseen_faces:
            return faces
        unseen = faces[_UNSEEN_EVERY - 1 :: _UNSEEN_EVERY]
        return unseen if split == _TEST else tuple(face for face in faces if face not in unseen)

    def train_transform(self) -> Transform:
        """Shift at random; the border is repeated."""
        shift = v2.RandomCrop(self.image_size, padding=self.image_size // 8, padding_mode="edge")
        return floats(shift)

    def test_transform(self) -> Transform:
        """Change nothing."""
        return floats()


def drawn(masks: Pixels, words: Integers, size: int) -> Pixels:
    """Draw a character (N, 3, size, size), uint8.

    Args:
        masks: The character in each face (F, M, M), uint8, in the middle, with an em of ``2 * size`` pixels.
        words: Random integers (N, 32 + size²) in [0, 65536), those of an image in a row.
        size: Height and width of an image in pixels.
    """

    def between(low: int, high: int, word: Integers) -> Integers:
        return low + (word * (high - low + 1) >> 16)

    face = between(0, len(masks) - 1, words[:, :1])
    zoom = between(_ONE * 45 // 100, _ONE * 60 // 100, words[:, 1:2])  # an em is 111 to 83 % of the image
    slant = between(-_ONE // 4, _ONE // 4, words[:, 2:3])
    tilt = between(-_ONE // 6, _ONE // 6, words[:, 3:4])
    shift_x, shift_y = (between(-size // 2, size // 2, words[:, [index]]) for index in (4, 5))
    corners = between(-48, 48, words[:, 6:18]).reshape(-1, 3, 2, 2)
    ground = between(112, 255, words[:, 18:21])
    ink = ground - between(64, 112, words[:, 21:24])
    strength = between(8, 40, words[:, 24:25])
    period = between(_FINE * size // 10, _FINE * size // 4, words[:, 25:26])
    rise, run = (between(-_FINE, _FINE, words[:, [index]]) for index in (26, 27))
    start = between(0, _FINE * size // 4, words[:, 28:29])
    depth = between(16, 48, words[:, 29:30])
    noise = between(-256, 256, words[:, _SETTINGS:]).reshape(-1, 1, size, size)

    # A mask pixel for each quarter of the area of a pixel of the image; the mean of the four is its coverage.
    grid = np.arange(1 - 2 * size, 2 * size, 2, dtype=np.int32)  # in quarters of a pixel, from the middle
    right, down = zoom * (grid - shift_x), zoom * (grid - shift_y)
    middle, last = masks.shape[1] << _BITS - 1, masks.shape[1] - 1
    columns = middle + right[:, None, :] + (slant * (down >> 4) >> _BITS - 4)[:, :, None]
    rows = middle + down[:, :, None] + (tilt * (right >> 4) >> _BITS - 4)[:, None, :]
    samples = masks[face[:, :, None], (rows >> _BITS).clip(0, last), (columns >> _BITS).clip(0, last)]
    coverage = samples.reshape(-1, 1, size, 2, size, 2).sum(axis=(3, 5), dtype=np.int32) >> 2

    along = np.arange(size, dtype=np.int32)
    place = (start + run * along)[:, None, :] + (rise * along)[:, :, None]
    ruled = place % period[:, :, None] < period[:, :, None] // 3
    light = ground[:, :, None, None] + _between_corners(corners, size)
    light -= np.where(ruled, depth[:, :, None], 0)[:, None]
    pixels = light + ((ink[:, :, None, None] - light) * coverage >> 8)
    pixels += noise * strength[:, :, None, None] >> 8
    images: npt.NDArray[np.uint8] = pixels.clip(0, 255).astype(np.uint8)
    return images


def _between_corners(corners: Integers, size: int) -> Integers:
    """Interpolate the values of four corners (N, C, 2, 2) over an image: (N, C, size, size)."""
    far = np.arange(size, dtype=np.int32)
    near = far[::-1]
    rows = corners[..., :1, :] * near[:, None] + corners[..., 1:, :] * far[:, None]
    found = (rows[..., :1] * near + rows[..., 1:] * far) // max(1, (size - 1) ** 2)
    return found.astype(np.int32, copy=False)


def _words(number: int, width: int, entropy: tuple[int, ...]) -> Integers:
    """Return random integers (number, width) in [0, 65536); a larger number continues a smaller one."""
    # RandomState is frozen: its numbers are the same under every version of NumPy.
    generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(entropy)))
    return generator.randint(0, 1 << 16, (number, width), dtype=np.int32)


# The fonts


@cache
def fonts_sha256() -> str:
    """Return the sha256 over the font files, in the order of the faces."""
    sha256 = hashlib.sha256()
    for face in UNICODE_FACES + LATIN_FACES:
        sha256.update(_file(face).read_bytes())
    return sha256.hexdigest()


def _file(face: str) -> Path:
    return Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")


@cache
def _font(face: str) -> FT2Font:
    return FT2Font(str(_file(face)))


def _masks(faces: tuple[str, ...], character: str, em: int) -> Pixels:
    """Return a character in each of ``faces`` (F, 2 em, 2 em), uint8, in the middle."""
    return np.stack([_mask(face, character, em) for face in faces])


def _mask(face: str, character: str, em: int) -> Pixels:
    font = _font(face)
    font.set_size(em, 72)  # points are pixels
    font.set_text(character, flags=LoadFlags.NO_HINTING)
    font.draw_glyphs_to_bitmap()
    ink = np.asarray(font.get_image())
    canvas = np.zeros((2 * em, 2 * em), dtype=np.uint8)
    height, width = ink.shape
    top, left = (2 * em - height) // 2, (2 * em - width) // 2
    canvas[top : top + height, left : left + width] = ink
    return canvas
