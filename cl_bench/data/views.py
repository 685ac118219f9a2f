"""How a decoded image becomes what a network sees, as published codebases do it: the transform presets.

A preset gives pixels in [0, 1] and normalises nothing: that is the backbone's ``normalisation``, and a preset
names the one it was published with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

PresetName = Literal["inflora", "pilot", "clip"]

PRESETS: tuple[PresetName, ...] = get_args(PresetName)

_SCALE = {"inflora": (0.08, 1.0), "pilot": (0.05, 1.0)}
_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10  # of a random crop, before the centre is taken: torchvision's number

NORMALISATION = {"inflora": "unit", "pilot": "unit", "clip": "clip"}
"""The backbone's normalisation that each preset was published with."""


class Pixels:
    """An image that is an array already; only what is asked of it becomes a Pillow image.

    Args:
        array: RGB (H, W, 3), uint8.
    """

    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        self.array = array

    @property
    def height(self) -> int:
        """In pixels."""
        return int(self.array.shape[0])

    @property
    def width(self) -> int:
        """In pixels."""
        return int(self.array.shape[1])

    def crop(self, box: tuple[int, int, int, int]) -> Pixels:
        """Return the part from column and row to column and row, as Pillow counts them."""
        left, top, right, bottom = box
        return Pixels(self.array[top:bottom, left:right])

    def pillow(self) -> Image.Image:
        """Return the image as Pillow's."""
        return Image.fromarray(self.array)


Picture = Image.Image | Pixels
"""An image in RGB."""


class Box(NamedTuple):
    """A part of an image in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


@dataclass(frozen=True)
class RandomView:
    """A random crop of random shape, resized to a square and mirrored every second time.

    It draws as torchvision's ``RandomResizedCrop`` and ``RandomHorizontalFlip`` do one after the other: with
    one state of torch's generator, both give one picture. Of an array torch resizes the crop, a third as long
    as Pillow; its sums are rounded otherwise, by 2 of 255 levels at most where that was measured.

    Attributes:
        size: Height and width of the view, in pixels.
        scale: Smallest and largest share of the image's area that a crop covers.
        ratio: Smallest and largest width of a crop over its height.
        interpolation: How the crop is resized.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = _RATIO
    interpolation: str = "bilinear"

    def box(self, height: int, width: int) -> Box:
        """Draw what is shown of an image of ``height`` × ``width`` pixels."""
        top, left, crop_height, crop_width = self._crop(height, width)
        return Box(top, left, crop_height, crop_width, bool(torch.rand(1) < 0.5))

    def pixels(self, image: Picture) -> Tensor:
        """Return a view (3, S, S) of ``image``, uint8."""
        box = self.box(image.height, image.width)
        pixels = _square(cropped(image, box), self.size, self.interpolation)
        return pixels.flip(2) if box.mirrored else pixels

    def __call__(self, image: Picture) -> Tensor:
        """Return a view (3, S, S) of ``image`` in [0, 1]."""
        return scaled(self.pixels(image))

    def _crop(self, height: int, width: int) -> tuple[int, int, int, int]:
        lowest, highest = _log(self.ratio)
        for _ in range(_ATTEMPTS):
            area = height * width * torch.empty(1).uniform_(*self.scale).item()
            ratio = torch.exp(torch.empty(1).uniform_(lowest, highest)).item()
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = int(torch.randint(0, height - crop_height + 1, size=(1,)))
                left = int(torch.randint(0, width - crop_width + 1, size=(1,)))
                return top, left, crop_height, crop_width
        crop_width, crop_height = width, height
        if width < height * self.ratio[0]:
            crop_height = round(width / self.ratio[0])
        elif width > height * self.ratio[1]:
            crop_width = round(height * self.ratio[1])
        return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


@dataclass(frozen=True)
class CentreView:
    """The centre of an image whose short side is resized first; always the same.

    Attributes:
        size: Height and width of the view, in pixels.
        short_side: Short side of the whole image before its centre is cropped, in pixels.
        interpolation: How the image is resized.
    """

    size: int
    short_side: int
    interpolation: str = "bilinear"

    def resized(self, image: Image.Image) -> Image.Image:
        """Return ``image`` with its short side resized, as it is before the crop."""
        height, width = resized_shape(image.height, image.width, self.short_side)
        resized = _resized(image, height, width, self.interpolation)
        assert isinstance(resized, Image.Image)
        return resized

    def pixels(self, image: Picture) -> Tensor:
        """Return the view (3, S, S) of ``image``, uint8."""
        height, width = resized_shape(image.height, image.width, self.short_side)
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        # Pillow resizes along rows, rounds, and resizes along columns. Done apart, columns that are cropped
        # away are left out of the second step.
        rows = _resized(image, image.height, width, self.interpolation)
        columns = rows.crop((left, 0, left + self.size, rows.height))
        whole = _resized(columns, height, self.size, self.interpolation)
        return pixels_of(whole.crop((0, top, self.size, top + self.size)))

    def __call__(self, image: Picture) -> Tensor:
        """Return the view (3, S, S) of ``image`` in [0, 1]."""
        return scaled(self.pixels(image))


View = RandomView | CentreView


@dataclass(frozen=True)
class Preset:
    """The views of one published codebase.

    Attributes:
        train: For training.
        test: For everything else.
    """

    train: View
    test: CentreView


def preset(name: PresetName, size: int, *, whole: bool = False) -> Preset:
    """Return the views of a published codebase.

    Args:
        name: ``inflora`` (InfLoRA, LoRA-DRS, BiLoRA), ``pilot`` (PILOT, SD-LoRA, LoDA), or ``clip``, CLIP's
            own preprocessing in training too, as KeepLoRA has it.
        size: Height and width of a view, in pixels.
        whole: Whether ``inflora`` shows a whole test image, as it does of CIFAR-100, in place of the centre.
    """
    short_side = resize_before_crop(size)
    if name == "clip":
        view = CentreView(size, size, "bicubic")
        return Preset(view, view)
    if name == "pilot":
        return Preset(RandomView(size, _SCALE[name]), CentreView(size, short_side, "bicubic"))
    return Preset(RandomView(size, _SCALE[name]), CentreView(size, size if whole else short_side))


def resize_before_crop(size: int) -> int:
    """Return the short side before a crop of ``size``, in the proportion of 256 to 224.

    >>> resize_before_crop(224)
    256
    """
    return round(size * 8 / 7)


def resized_shape(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Return height and width once the short side is ``short_side``; the long one is rounded down.

    >>> resized_shape(375, 500, 256)
    (256, 341)
    """
    if height <= width:
        return short_side, int(short_side * width / height)
    return int(short_side * height / width), short_side


def scaled(pixels: Tensor) -> Tensor:
    """Return uint8 ``pixels`` in [0, 1] as float32, divided by 255 as in published code."""
    if not pixels.is_cpu:
        return pixels.to(torch.float32).div_(255)
    # NumPy works in huge pages and on one thread. Torch would take longer for page faults than to divide, and
    # its second thread would wait for a core that a worker holds.
    floats = np.empty(tuple(pixels.shape), dtype=np.float32)
    return torch.from_numpy(np.divide(pixels.numpy(), np.float32(255), out=floats))


def cropped(image: Picture, box: Box) -> Picture:
    """Return what ``box`` shows of ``image``, not mirrored."""
    return image.crop((box.left, box.top, box.left + box.width, box.top + box.height))


def pixels_of(image: Picture) -> Tensor:
    """Return an RGB image as a tensor (3, H, W), uint8."""
    if isinstance(image, Pixels):
        planes = image.array.transpose(2, 0, 1)
    else:  # Pillow writes the colours of a line apart sooner than NumPy takes them apart
        lines = np.frombuffer(image.tobytes("raw", "RGB;L"), dtype=np.uint8)
        planes = lines.reshape(image.height, 3, image.width).transpose(1, 0, 2)
    return torch.from_numpy(planes.copy())


@cache
def _log(ratio: tuple[float, float]) -> tuple[float, float]:
    """Return the logarithms in the precision in which torchvision takes them."""
    lowest, highest = torch.log(torch.tensor(ratio)).tolist()
    return lowest, highest


def _square(image: Picture, size: int, interpolation: str) -> Tensor:
    """Return ``image`` resized to (3, S, S), uint8."""
    if isinstance(image, Pixels):
        whole = pixels_of(image).unsqueeze(0)
        return torch.nn.functional.interpolate(whole, (size, size), mode=interpolation, antialias=True)[0]
    return pixels_of(_resized(image, size, size, interpolation))


def _resized(image: Picture, height: int, width: int, interpolation: str) -> Picture:
    if (image.height, image.width) == (height, width):
        return image
    whole = image.pillow() if isinstance(image, Pixels) else image
    return whole.resize((width, height), Image.Resampling[interpolation.upper()])
