from __future__ import annotations

import pytest
import torch

from datamodules.fractals import Systems, attractors, random_systems, varied


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sierpinski() -> Systems:
    matrices = 0.5 * torch.eye(2).expand(1, 3, 2, 2)
    offsets = torch.tensor([[[0.0, 0.0], [0.5, 0.0], [0.0, 0.5]]])
    return Systems(matrices, offsets, torch.tensor([[0.0, 0.5, 1.0]]))


@pytest.mark.parametrize("maps", [2, 3, 5])
@pytest.mark.parametrize("mirrored", [True, False])
def test_the_parity_of_the_reflections_is_the_requested_one(maps: int, mirrored: bool) -> None:
    systems = random_systems(200, maps, mirrored=mirrored, generator=generator())
    assert set((systems.reflections % 2).tolist()) == {int(mirrored)}


def test_variation_changes_every_map_and_no_parity() -> None:
    systems = random_systems(200, 3, mirrored=True, generator=generator())
    others = varied(systems, 0.2, generator(1))
    assert torch.equal(others.reflections, systems.reflections)
    assert ((others.matrices - systems.matrices).abs().amax(dim=(2, 3)) > 0).all()


@pytest.mark.parametrize("maps", [2, 3, 5])
def test_every_map_contracts_and_their_sum_is_in_the_published_range(maps: int) -> None:
    systems = random_systems(100, maps, mirrored=False, generator=generator())
    values = torch.linalg.svdvals(systems.matrices)
    assert values.max() < 0.951
    total = (values[..., 0] + 2 * values[..., 1]).sum(dim=1)
    assert total.min() >= (5 + maps) / 2 - 1e-4
    assert total.max() <= (6 + maps) / 2 + 1e-4


def test_the_chaos_game_draws_the_sierpinski_triangle_and_nothing_else() -> None:
    coverage, _ = attractors(sierpinski(), 64, generator())
    rows, columns = (coverage[0] > 0).nonzero().T.numpy()
    # A pixel is on the triangle if no binary digit is 1 in both row and column, up to rounding by one pixel.
    near = [
        any((r + i) & (c + j) == 0 for i in (-1, 0, 1) for j in (-1, 0, 1) if r + i >= 0 and c + j >= 0)
        for r, c in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
    assert all(near)
    assert 3**6 / 2 < len(near) < 2 * 3**6
    assert rows.min() == columns.min() == 0
    assert rows.max() == columns.max() == 63


def test_the_colour_of_a_point_follows_the_maps_that_led_there() -> None:
    coverage, hue = attractors(sierpinski(), 64, generator())
    corner, lower = hue[0, :8, :8][coverage[0, :8, :8] > 0], hue[0, -8:, :8][coverage[0, -8:, :8] > 0]
    assert corner.mean() < 0.2  # three times through the map of hue 0
    assert lower.mean() > 0.8
