from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_bench.maths.memory import GPM
from cl_bench.measure.moments import second_moments
from cl_bench.measure.passes import measure
from cl_bench.measure.sketch import InputSketch

Making = Callable[..., Any]


def protecting(columns: int) -> GPM:
    """Return a memory of two layers, 32 wide, in which random directions are protected."""
    memory = GPM(2, 32)
    generator = torch.Generator().manual_seed(5)
    for layer in range(2):
        drawn = torch.randn(32, columns, generator=generator, dtype=torch.float64)
        memory.replace(layer, torch.linalg.qr(drawn).Q)
    return memory


def traces(moments: Tensor) -> Tensor:
    return moments.diagonal(dim1=-2, dim2=-1).sum(-1)


@pytest.mark.parametrize("columns", (0, 5))
def test_a_sketch_as_wide_as_the_inputs_is_exact_outside_of_what_is_protected(
    columns: int, adapted: Making, batches: Making
) -> None:
    backbone, layers = adapted()
    memory = protecting(columns)
    sketch = InputSketch(layers, memory, rows=32)
    measure(backbone, batches(4), sketch)
    moments = second_moments(backbone, layers, batches(12))
    for layer, (ours, exact) in enumerate(zip(sketch.mean(), moments, strict=True)):
        outside = memory.right_residual(memory.residual(exact, layer), layer)
        ours_outside = memory.right_residual(memory.residual(ours, layer), layer)
        torch.testing.assert_close(ours_outside, outside, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", (2, 8))
def test_energies_of_a_sketch_are_exact_however_small_it_is(
    rows: int, adapted: Making, batches: Making
) -> None:
    backbone, layers = adapted()
    memory = protecting(5)
    sketch = InputSketch(layers, memory, rows=rows)
    measure(backbone, batches(4), sketch)
    found, exact = sketch.mean(), second_moments(backbone, layers, batches(12))
    torch.testing.assert_close(traces(found), traces(exact), atol=0, rtol=1e-5)
    for layer in range(2):
        inside, expected = (
            1 - memory.residual(moments[layer], layer).trace() / moments[layer].trace()
            for moments in (found, exact)
        )
        assert abs(inside - expected) < 1e-5


def test_layers_of_several_projections_read_the_memory_that_these_share(
    adapted: Making, batches: Making
) -> None:
    backbone, layers = adapted(("k", "v"))
    of_layers, of_projections = protecting(5), GPM([0, 0, 1, 1], 32)
    for layer in range(2):
        of_projections.replace(2 * layer, of_layers.basis(layer))
    sketches = [InputSketch(layers, memory, rows=8) for memory in (of_layers, of_projections)]
    measure(backbone, batches(4), *sketches)
    assert torch.equal(sketches[0].mean(), sketches[1].mean())


def test_a_sketch_errs_by_no_more_than_what_frequent_directions_guarantee(
    adapted: Making, batches: Making
) -> None:
    """No direction gains, and none loses more than the whole divided by the number of rows."""
    backbone, layers = adapted()
    sketch = InputSketch(layers, GPM(2, 32), rows=8)
    measure(backbone, batches(4), sketch)
    moments = second_moments(backbone, layers, batches(12))
    tokens = sketch.tokens[:, None, None]
    kept = sketch.sketch.double().mT @ sketch.sketch.double() / tokens
    lost = torch.linalg.eigvalsh(moments - kept)
    assert lost.min() > -1e-5
    assert bool((lost.max(dim=1).values <= traces(moments) / 8).all())


@pytest.mark.parametrize(("images", "places"), ((256, 5), (512, 17), (256, 65), (12, 5)))
def test_a_sketch_takes_tokens_from_every_place_of_an_image(images: int, places: int) -> None:
    """A stride that divides the number of places would take the same ones of every image."""
    layer = nn.Linear(places, 1)
    sketch = InputSketch([layer], GPM(1, places), rows=places, most_tokens=256)
    with sketch.recording():
        layer(torch.eye(places).expand(images, places, places))  # each token marks its place
    taken = min(256, images * places)
    assert sketch.tokens.tolist() == [taken]
    counts = taken * sketch.mean()[0].diagonal()
    assert counts.min() > 0.99
    assert counts.max() < 2 * taken / places + 0.01


@pytest.mark.parametrize("places", (257, 577))
@pytest.mark.parametrize("images", (1, 3))
def test_every_token_of_an_image_is_taken_equally_often_up_to_one(images: int, places: int) -> None:
    """Of 257 tokens a fixed choice of 256 misses one, and of 577 tokens 321, with all of their energy."""
    layer = nn.Linear(places, 1)
    sketch = InputSketch([layer], GPM(1, places), rows=places)
    with sketch.recording():
        for _ in range(3):
            layer(torch.eye(places).expand(images, places, places))  # each token marks its place
    counts = 3 * 256 * sketch.mean()[0].diagonal()
    torch.testing.assert_close(counts, counts.round(), atol=1e-3, rtol=0)
    assert counts.min().round() == 3 * 256 // places
    assert counts.max().round() == 3 * 256 // places + 1


def test_a_resumed_sketch_takes_the_tokens_that_it_would_have_taken() -> None:
    layer, memory = nn.Linear(8, 1), GPM(1, 8)
    images = torch.randn(6, 1, 577, 8, generator=torch.Generator().manual_seed(3))
    whole, first, second = (InputSketch([layer], memory, rows=4, every=2) for _ in range(3))
    for sketch, part in ((whole, images), (first, images[:3])):
        with sketch.recording():
            for image in part:
                layer(image)
    second.load_state_dict(first.state_dict())
    with second.recording():
        for image in images[3:]:
            layer(image)
    assert torch.equal(second.sketch, whole.sketch)
    assert torch.equal(second.outside, whole.outside)


def test_a_sketch_counts_the_tokens_that_it_takes(adapted: Making, batches: Making) -> None:
    backbone, layers = adapted()
    sketch = InputSketch(layers, GPM(2, 32), rows=4, most_tokens=20)
    measure(backbone, batches(12), sketch)
    assert sketch.tokens.tolist() == [20, 20]


def test_what_a_sketch_cannot_do_is_refused(adapted: Making) -> None:
    _, layers = adapted()
    with pytest.raises(ValueError, match="set energy to features"):
        InputSketch(layers, GPM(2, 32, "covariance"))
    with pytest.raises(ValueError, match="give it at least one"):
        InputSketch(layers, GPM(2, 32), rows=0)
    with pytest.raises(ValueError, match="seen no token"):
        InputSketch(layers, GPM(2, 32)).mean()
    with pytest.raises(ValueError, match="Layers of 3 and 4 inputs cannot share a statistic"):
        InputSketch([nn.Linear(4, 1), nn.Linear(3, 1)], GPM(2, 4))
