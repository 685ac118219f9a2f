from __future__ import annotations

import pytest
import torch
from pretraining.descriptors import Descriptors
from pretraining.scenes import random_scenes


@pytest.fixture(scope="module")
def scenes() -> torch.Tensor:
    return random_scenes(300, 32, 5, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def fitted(scenes: torch.Tensor) -> Descriptors:
    descriptors = Descriptors(entries=20, dim=8, side=4)
    descriptors.fit(scenes, torch.Generator().manual_seed(1))
    return descriptors


def test_descriptions_of_the_fitted_scenes_are_white(scenes: torch.Tensor, fitted: Descriptors) -> None:
    descriptions = fitted(scenes).mean(dim=1)
    torch.testing.assert_close(descriptions.mean(dim=0), torch.zeros(8), atol=1e-3, rtol=0)
    second = descriptions.T @ descriptions / len(descriptions)
    torch.testing.assert_close(second, torch.eye(8), atol=1e-2, rtol=0)


def test_descriptions_are_robust_to_a_change_of_light(scenes: torch.Tensor, fitted: Descriptors) -> None:
    dark = (scenes // 4 + 20).clamp(0, 120)
    bright = 2 * dark
    similar = torch.cosine_similarity(fitted(dark).mean(dim=1), fitted(bright).mean(dim=1))
    others = torch.cosine_similarity(fitted(dark).mean(dim=1), fitted(bright).mean(dim=1).roll(1, dims=0))
    assert similar.mean() > others.mean() + 0.5


def test_a_target_depends_on_the_part_of_its_token(scenes: torch.Tensor, fitted: Descriptors) -> None:
    changed = scenes[:8].clone()
    changed[:, :, :8, :8] = 255 - changed[:, :, :8, :8].flip(2)
    difference = (fitted(changed) - fitted(scenes[:8])).abs().amax(dim=(0, 2)).view(4, 4)
    assert difference[0, 0] > 0.1
    # Patches reach a little over the border of their token, but not as far as the second neighbour.
    assert difference[2:, :].max() == difference[:, 2:].max() == 0
