from __future__ import annotations

import torch
from pretraining.glyphs import Glyphs, drawings, random_glyphs


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(seed: int) -> torch.Tensor:
    return drawings(random_glyphs(24, generator(seed)), 32, generator(seed + 1))


def test_drawings_are_a_function_of_the_generators() -> None:
    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_all_drawings_of_one_glyph_differ() -> None:
    one = random_glyphs(1, generator(2))[torch.zeros(24, dtype=torch.long)]
    found = drawings(one, 32, generator(3))
    assert found.shape == (24, 3, 32, 32)
    assert found.dtype == torch.uint8
    assert len(found.unique(dim=0)) == 24


def test_a_stroke_that_is_absent_leaves_no_mark() -> None:
    two = random_glyphs(200, generator(4))
    two = two[~two.present[:, 2]]
    assert len(two) > 20
    moved = Glyphs(two.strokes.clone(), two.present)
    moved.strokes[:, 2:] += 0.5
    assert torch.equal(drawings(two, 32, generator(5)), drawings(moved, 32, generator(5)))


def test_glyphs_fill_their_box() -> None:
    many = random_glyphs(500, generator(8))
    largest = many.strokes.masked_fill(~many.present[:, :, None, None], 0).abs().amax(dim=(1, 2, 3))
    assert largest.max() <= 1 + 1e-6
    assert (largest > 0.999).float().mean() > 0.95
