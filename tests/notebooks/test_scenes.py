from __future__ import annotations

import torch
from pretraining.scenes import random_scenes


def scenes(seed: int, number: int = 24) -> torch.Tensor:
    return random_scenes(number, 32, 5, torch.Generator().manual_seed(seed))


def test_scenes_are_a_function_of_the_generator() -> None:
    assert torch.equal(scenes(0), scenes(0))
    assert not torch.equal(scenes(0), scenes(1))


def test_all_scenes_of_a_batch_differ() -> None:
    found = scenes(2)
    assert found.shape == (24, 3, 32, 32)
    assert found.dtype == torch.uint8
    assert len(found.unique(dim=0)) == 24


def test_power_falls_with_frequency_as_in_photographs() -> None:
    grey = scenes(3, 100).float().mean(dim=1)
    power = torch.fft.rfft2(grey - grey.mean(dim=(1, 2), keepdim=True)).abs().square().mean(dim=0)
    rings = [power[ring, ring].item() for ring in (1, 2, 4, 8)]
    assert rings == sorted(rings, reverse=True)
    assert rings[0] > 20 * rings[-1]


def test_channels_are_correlated() -> None:
    pixels = scenes(4, 100).float().flatten(2)
    channels = (pixels - pixels.mean(dim=2, keepdim=True)).transpose(0, 1).flatten(1)
    assert torch.corrcoef(channels)[0, 1] > 0.5
