from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

from cl_bench.data.views import PRESETS, CentreView, Pixels, PresetName, RandomView, preset

SHAPES = [(375, 500), (500, 375), (224, 224), (40, 300), (31, 33)]


def picture(height: int, width: int) -> Image.Image:
    noise = np.random.RandomState(0).randint(256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.05, 1.0), (1.0, 1.0)])
def test_a_random_view_is_torchvisions(shape: tuple[int, int], scale: tuple[float, float]) -> None:
    image = picture(*shape)
    view = RandomView(32, scale)
    theirs = v2.Compose([v2.RandomResizedCrop(32, scale=scale), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    for seed in range(10):
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        assert torch.equal(view.pixels(image), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_centre_view_is_torchvisions(shape: tuple[int, int], interpolation: str) -> None:
    image = picture(*shape)
    theirs = transforms.Compose(
        [
            transforms.Resize(64, interpolation=transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(56),
            transforms.ToTensor(),
        ]
    )
    assert torch.equal(CentreView(56, 64, interpolation)(image), theirs(image))


def test_a_view_is_its_pixels_over_255() -> None:
    view = CentreView(32, 32)
    assert torch.equal(view(picture(32, 32)), view.pixels(picture(32, 32)) / 255)


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("inflora", RandomView(224, (0.08, 1.0)), CentreView(224, 256)),
        ("pilot", RandomView(224, (0.05, 1.0)), CentreView(224, 256, "bicubic")),
        ("clip", CentreView(224, 224, "bicubic"), CentreView(224, 224, "bicubic")),
    ],
)
def test_a_preset_is_what_its_codebase_does(name: PresetName, train: object, test: object) -> None:
    found = preset(name, 224)
    assert (found.train, found.test) == (train, test)


def test_inflora_shows_whole_test_images_of_cifar() -> None:
    assert preset("inflora", 224, whole=True).test == CentreView(224, 224)
    assert preset("pilot", 224, whole=True) == preset("pilot", 224)


def test_presets_differ_in_their_texts() -> None:
    texts = {(repr(found.train), repr(found.test)) for found in (preset(name, 224) for name in PRESETS)}
    assert len(texts) == len(PRESETS)
    assert not any(" at 0x" in text for pair in texts for text in pair)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_of_an_array_are_nearly_those_of_the_same_image(interpolation: str) -> None:
    generator = np.random.RandomState(0)
    coarse = Image.fromarray(generator.randint(256, size=(32, 43, 3), dtype=np.uint8))
    image = coarse.resize((341, 256), Image.Resampling.BICUBIC)
    view = RandomView(224, (0.08, 1.0), interpolation=interpolation)
    kept = Pixels(np.array(image))
    differences = []
    for seed in range(20):
        views = []
        for picture in (image, kept):
            torch.manual_seed(seed)
            views.append(view.pixels(picture).to(torch.int16))
        differences.append((views[0] - views[1]).abs())
    assert max(int(difference.max()) for difference in differences) <= 2
    assert np.mean([float((difference > 0).float().mean()) for difference in differences]) < 0.05
