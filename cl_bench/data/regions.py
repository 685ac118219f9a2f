"""Batched augmentation: crops leave the workers at their own sizes and become views on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from cl_bench.data.views import Picture, RandomView, cropped, pixels_of


class Region(NamedTuple):
    """What a random view shows of an image, before it is resized.

    Attributes:
        pixels: The crop (3, h, w), uint8.
        mirrored: Whether its view is mirrored.
    """

    pixels: Tensor
    mirrored: bool


class Regions(NamedTuple):
    """A batch of regions, all of whole numbers: no precision changes them on the way to the device.

    Attributes:
        canvas: Each region in the upper left corner, its last row and column repeated (B, 3, H, W), uint8.
        sizes: Height and width of each region (B, 2).
        mirrored: Whether each view is mirrored (B,).
    """

    canvas: Tensor
    sizes: Tensor
    mirrored: Tensor


@dataclass(frozen=True)
class BatchedView:
    """A random view in two steps: a region is cut out of each image, and a batch of them is resized at once.

    Boxes are drawn exactly as by the view itself. Resizing reads the nearest pixels of the region without
    averaging over those that a smaller view leaves out, which Pillow does, and rounds nothing to whole
    levels.

    Attributes:
        view: The view of a single image.
    """

    view: RandomView

    def region(self, image: Picture) -> Region:
        """Draw a region of ``image``."""
        box = self.view.box(image.height, image.width)
        return Region(pixels_of(cropped(image, box)), box.mirrored)

    def views(self, regions: Regions) -> Tensor:
        """Return the views (B, 3, S, S) of ``regions`` in [0, 1], on their device."""
        canvas, sizes, mirrored = regions
        rows = _places(sizes[:, 0], self.view.size, canvas.shape[2])
        columns = _places(sizes[:, 1], self.view.size, canvas.shape[3])
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        shape = (len(canvas), self.view.size, self.view.size)
        grid = torch.stack([columns[:, None, :].expand(shape), rows[:, :, None].expand(shape)], dim=-1)
        return grid_sample(
            canvas.to(torch.float32).div_(255),
            grid,
            mode=self.view.interpolation,
            padding_mode="border",
            align_corners=False,
        ).clamp_(0, 1)

    def __call__(self, image: Picture) -> Tensor:
        """Return a view (3, S, S) of one ``image`` in [0, 1], by both steps."""
        view: Tensor = self.views(batched([self.region(image)]))[0]
        return view


Memory = Callable[[Sequence[int]], Tensor]
"""Gives a tensor of a shape, uint8, to be filled."""


def fresh(shape: Sequence[int]) -> Tensor:
    """Give a new tensor of a shape, uint8, to be filled."""
    return torch.empty(*shape, dtype=torch.uint8)


def batched(regions: Sequence[Region], memory: Memory = fresh) -> Regions:
    """Put regions of any sizes onto one canvas.

    Args:
        regions: At least one.
        memory: Gives the canvas.
    """
    sizes = [region.pixels.shape[1:] for region in regions]
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    canvas = memory((len(regions), 3, height, width))
    for place, (region, (h, w)) in zip(canvas, zip(regions, sizes, strict=True), strict=True):
        place[:, :h, :w] = region.pixels
        place[:, h:, :w] = region.pixels[:, -1:]
        place[:, :, w:] = place[:, :, w - 1 : w]
    return Regions(canvas, torch.tensor(sizes), torch.tensor([region.mirrored for region in regions]))


def _places(extents: Tensor, size: int, whole: int) -> Tensor:
    """Return where the pixels of a view lie along one side of the canvas (B, S), from -1 to 1 over all of it.

    Pixel i of a view of S pixels has its centre at (i + 1/2) · extent / S.
    """
    centres = torch.arange(size, device=extents.device, dtype=torch.float32) + 0.5
    return centres * extents[:, None] * (2 / (size * whole)) - 1
