"""The transform presets: how published codebases turn a decoded image into the input of a network.

A preset gives pixels in [0, 1], which the backbone normalises. ``NORMALISATION`` names the normalisation that
each preset was published with.
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
from torchvision.transforms import v2

from cl_bench.data.stream import Transform

PresetName = Literal["inflora", "pilot", "clip"]

PRESETS: tuple[PresetName, ...] = get_args(PresetName)

_SCALE = {"inflora": (0.08, 1.0), "pilot": (0.05, 1.0)}
_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10  # at a random crop, before the centre is taken: torchvision's number

NORMALISATION = {"inflora": "unit", "pilot": "unit", "clip": "clip"}
"""The backbone's normalisation that each preset was published with."""


def floats(*steps: v2.Transform) -> Transform:
    """Return ``steps``, which keep an image (3, H, W) in uint8, and then its conversion to [0, 1]."""
    transform: Transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])
    return transform


class Pixels:
    """An image held as an array; only the parts that are used become Pillow images.

    Args:
        array: RGB (H, W, 3), uint8.
    """

    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        self.array = array

    @property
    def height(self) -> int:
        """Height in pixels."""
        return int(self.array.shape[0])

    @property
    def width(self) -> int:
        """Width in pixels."""
        return int(self.array.shape[1])

    def crop(self, box: tuple[int, int, int, int]) -> Pixels:
        """Return the part within ``box``: left, top, right and bottom, as Pillow counts them."""
        left, top, right, bottom = box
        return Pixels(self.array[top:bottom, left:right])

    def pillow(self) -> Image.Image:
        """Return the image as a Pillow image."""
        return Image.fromarray(self.array)


Picture = Image.Image | Pixels
"""An RGB image."""


class Box(NamedTuple):
    """A part of an image in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


@dataclass(frozen=True)
class RandomView:
    """A random crop of random shape, resized to a square and mirrored with probability 1/2.

    The view equals torchvision's ``RandomResizedCrop`` followed by ``RandomHorizontalFlip`` under the same
    state of torch's generator. Pillow resizes a crop of a Pillow image; torch resizes a crop of an array, in
    a third of the time. The two round differently, by at most 2 of 255 levels in our measurements.

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
        """Draw the visible part of an image of ``height`` × ``width`` pixels."""
        top, left, crop_height, crop_width = self._crop(height, width)
        return Box(top, left, crop_height, crop_width, bool(torch.rand(1) < 0.5))

    def pixels(self, image: Picture) -> Tensor:
        """Return a view (3, S, S) of ``image``, uint8."""
        top, left, height, width, mirrored = self.box(image.height, image.width)
        crop = image.crop((left, top, left + width, top + height))
        pixels = _square(crop, self.size, self.interpolation)
        return pixels.flip(2) if mirrored else pixels

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
    """The centre crop of an image whose short side is resized first; deterministic.

    Attributes:
        size: Height and width of the view, in pixels.
        short_side: Short side of the whole image before its centre is cropped, in pixels.
        interpolation: How the image is resized.
    """

    size: int
    short_side: int
    interpolation: str = "bilinear"

    def resized(self, image: Image.Image) -> Image.Image:
        """Return ``image`` with its short side resized, before the crop."""
        height, width = resized_shape(image.height, image.width, self.short_side)
        resized = _resized(image, height, width, self.interpolation)
        assert isinstance(resized, Image.Image)
        return resized

    def pixels(self, image: Picture) -> Tensor:
        """Return the view (3, S, S) of ``image``, uint8."""
        height, width = resized_shape(image.height, image.width, self.short_side)
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        # Pillow resizes along rows, rounds, and resizes along columns. In two separate calls, the second one
        # skips the columns that the crop removes.
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
        train: The view for training.
        test: The view for evaluation and for plain data passes.
    """

    train: View
    test: CentreView


def preset(name: PresetName, size: int, *, whole: bool = False) -> Preset:
    """Return the views of a published codebase.

    Args:
        name: ``inflora`` (InfLoRA, LoRA-DRS, BiLoRA), ``pilot`` (PILOT, SD-LoRA, LoDA), or ``clip``, CLIP's
            own preprocessing in training too, as KeepLoRA has it.
        size: Height and width of a view, in pixels.
        whole: Whether ``inflora`` shows the whole test image, as for CIFAR-100, instead of its centre.
    """
    short_side = resize_before_crop(size)
    if name == "clip":
        view = CentreView(size, size, "bicubic")
        return Preset(view, view)
    if name == "pilot":
        return Preset(RandomView(size, _SCALE[name]), CentreView(size, short_side, "bicubic"))
    return Preset(RandomView(size, _SCALE[name]), CentreView(size, size if whole else short_side))


def resize_before_crop(size: int) -> int:
    """Return the short side before a crop of ``size``, in the ratio 256 to 224.

    >>> resize_before_crop(224)
    256
    """
    return round(size * 8 / 7)


def resized_shape(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Return height and width after resizing the short side to ``short_side``, the long one rounded down.

    >>> resized_shape(375, 500, 256)
    (256, 341)
    """
    if height <= width:
        return short_side, int(short_side * width / height)
    return int(short_side * height / width), short_side


def scaled(pixels: Tensor) -> Tensor:
    """Return uint8 ``pixels`` as float32 in [0, 1], divided by 255 as in published code."""
    if not pixels.is_cpu:
        return pixels.to(torch.float32).div_(255)
    # NumPy uses huge pages and one thread. torch would spend more time on page faults than on the division,
    # and its second thread would wait for a core that a worker occupies.
    floats = np.empty(tuple(pixels.shape), dtype=np.float32)
    return torch.from_numpy(np.divide(pixels.numpy(), np.float32(255), out=floats))


def pixels_of(image: Picture) -> Tensor:
    """Return an RGB image as a tensor (3, H, W), uint8."""
    if isinstance(image, Pixels):
        planes = image.array.transpose(2, 0, 1)
    else:  # Pillow separates the colours of a line faster than NumPy does
        lines = np.frombuffer(image.tobytes("raw", "RGB;L"), dtype=np.uint8)
        planes = lines.reshape(image.height, 3, image.width).transpose(1, 0, 2)
    return torch.from_numpy(planes.copy())


@cache
def _log(ratio: tuple[float, float]) -> tuple[float, float]:
    """Return the logarithms in the precision that torchvision uses."""
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
