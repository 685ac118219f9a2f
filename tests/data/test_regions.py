from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from cl_bench.data.regions import BatchedView, Region, batched
from cl_bench.data.views import CentreView, RandomView

SHAPES = [(256, 341), (341, 256), (256, 256), (300, 256), (256, 700)]


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth picture with edges."""
    coarse = np.random.RandomState(seed).randint(256, size=(height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways_show_the_same_boxes(shape: tuple[int, int]) -> None:
    view = RandomView(224, (0.08, 1.0))
    image = photograph(*shape)
    for seed in range(50):
        torch.manual_seed(seed)
        box = view.box(*shape)
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        region = BatchedView(view).region(image)
        assert torch.equal(torch.get_rng_state(), after)
        assert region.pixels.shape == (3, box.height, box.width)
        assert region.mirrored == box.mirrored
        rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, rows, columns]
        assert torch.equal(region.pixels, expected)


@pytest.mark.parametrize(("interpolation", "largest"), [("bilinear", 1.0), ("bicubic", 2.5)])
def test_enlarged_crops_differ_by_rounding_alone(interpolation: str, largest: float) -> None:
    view = RandomView(224, (0.08, 0.6), interpolation=interpolation)
    image = photograph(256, 256)
    for seed in range(20):
        torch.manual_seed(seed)
        exact = view.pixels(image).float()
        torch.manual_seed(seed)
        difference = (255 * BatchedView(view)(image) - exact).abs()
        assert difference.mean() < 0.5
        assert difference.max() <= largest


def test_reduced_crops_differ_little_on_a_smooth_picture() -> None:
    view = RandomView(128, (0.9, 1.0))
    image = photograph(256, 341)
    torch.manual_seed(0)
    exact = view(image)
    torch.manual_seed(0)
    assert (BatchedView(view)(image) - exact).abs().mean() < 2 / 255


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """Two photographs of 640 × 427 pixels, as scikit-learn ships them."""
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def test_the_pixels_of_photographs_differ_as_the_readme_says(photographs: list[Image.Image]) -> None:
    view, kept = RandomView(224, (0.08, 1.0)), CentreView(224, 256)
    batched_view, levels = BatchedView(view), []
    for photo in (kept.resized(photo) for photo in photographs):
        for seed in range(20):
            torch.manual_seed(seed)
            exact = view.pixels(photo).float()
            torch.manual_seed(seed)
            levels.append(float((255 * batched_view(photo) - exact).abs().mean()))
    assert 0.3 < np.mean(levels) < 0.45


def test_a_region_of_the_views_size_is_left_as_it_is() -> None:
    pixels = torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = BatchedView(RandomView(32, (1.0, 1.0))).views(
        batched([Region(pixels, False), Region(pixels, True)])
    )
    assert (views[0] - pixels / 255).abs().max() < 1e-5
    assert (views[1] - (pixels / 255).flip(2)).abs().max() < 1e-5


def test_a_view_does_not_depend_on_its_batch() -> None:
    view = BatchedView(RandomView(64, (0.08, 1.0)))
    torch.manual_seed(0)
    regions = [view.region(photograph(*shape, seed)) for seed, shape in enumerate(SHAPES)]
    together = view.views(batched(regions))
    for alone, among in zip(regions, together, strict=True):
        assert (view.views(batched([alone]))[0] - among).abs().max() < 1e-4


def test_regions_are_whole_numbers() -> None:
    view = BatchedView(RandomView(64, (0.08, 1.0)))
    assert not any(tensor.is_floating_point() for tensor in batched([view.region(photograph(256, 256))]))
