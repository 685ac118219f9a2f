from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from cl_bench.contracts.strategy import TrainingData
from cl_bench.data.experience import Experience
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.network.backbones import Backbone
from datamodules.toy import Toy
from strategies.bilora import BiLoRA, SpectralLinear, positions

Making = Callable[..., Backbone]


def layer(
    count: int = 40, index: int = 0, rows: slice = slice(8, 20), scale: float = 300.0
) -> SpectralLinear:
    """A layer of 16 inputs with a random spectrum on 12 of its 24 rows, in double precision."""
    torch.manual_seed(0)
    found = SpectralLinear(nn.Linear(16, 24, dtype=torch.float64), {"k": rows}, count, scale)
    found.place(index)
    with torch.no_grad():
        found.coefficients["k"].normal_()
    return found


def placed(found: SpectralLinear) -> list[tuple[int, int, float]]:
    """Return row, column and value of every coefficient."""
    flat, values = found.get_buffer("positions_k").tolist(), found.coefficients["k"].tolist()
    return [(*divmod(place, 16), value) for place, value in zip(flat, values, strict=True)]


def test_the_change_of_the_weight_is_the_transform_by_numpy() -> None:
    found = layer()
    spectrum = np.zeros((12, 16))
    for row, column, value in placed(found):
        spectrum[row, column] = value
    expected = 300 * np.fft.ifft2(spectrum).real
    np.testing.assert_allclose(found.delta_of("k").detach().numpy(), expected, atol=1e-12)


def test_the_change_of_the_weight_is_a_sum_of_cosines() -> None:
    found = layer()
    a, b = np.arange(12)[:, None], np.arange(16)[None, :]
    atoms = [value * np.cos(2 * np.pi * (u * a / 12 + v * b / 16)) for u, v, value in placed(found)]
    expected = 300 / (12 * 16) * np.sum(atoms, axis=0)
    np.testing.assert_allclose(found.delta_of("k").detach().numpy(), expected, atol=1e-10)


def test_the_gradient_of_a_coefficient_is_read_off_the_transformed_gradient() -> None:
    found = layer()
    x = torch.randn(7, 16, dtype=torch.float64)
    of_y = torch.randn(7, 24, dtype=torch.float64)
    found(x).backward(of_y)
    transformed = 300 / (12 * 16) * np.fft.fft2((of_y[:, 8:20].T @ x).numpy()).real
    expected = [transformed[row, column] for row, column, _ in placed(found)]
    gradient = found.coefficients["k"].grad
    assert gradient is not None
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-9)


def test_outputs_are_those_of_the_weight_plus_its_change() -> None:
    found = layer()
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    assert found.bias is not None
    expected = x @ found.weight.T + found.bias
    expected[..., 8:20] += x @ found.delta_of("k").T
    torch.testing.assert_close(found(x), expected)


def test_zero_coefficients_change_no_bit() -> None:
    found = layer().float()
    found.reset()
    x = torch.randn(3, 16)
    assert torch.equal(found(x), nn.functional.linear(x, found.weight, found.bias))


def test_merging_keeps_the_function() -> None:
    found = layer()
    x = torch.randn(3, 16, dtype=torch.float64)
    before = found(x)
    found.merge()
    assert not found.coefficients["k"].any()
    torch.testing.assert_close(found(x), before)


def test_a_coefficient_moves_the_weight_by_the_length_of_its_cosine() -> None:
    """A cosine over 768 × 768 entries has the mean square 1/2: ‖ΔW‖ is 300 / (768 √2) of ‖c‖."""
    found = SpectralLinear(nn.Linear(768, 768), {"k": slice(0, 768)}, 3000, 300.0)
    found.place(0)
    torch.manual_seed(0)
    with torch.no_grad():
        coefficients = found.coefficients["k"].normal_()
        ratio = found.delta_of("k").norm() / coefficients.norm()
    assert ratio.item() == pytest.approx(300 / (768 * math.sqrt(2)), rel=0.01)


def test_two_experiences_share_few_places_and_learn_in_other_directions() -> None:
    found = SpectralLinear(nn.Linear(768, 768), {"k": slice(0, 768)}, 3000, 300.0)
    chosen = [set(positions(index, 768 * 768, 3000).tolist()) for index in range(4)]
    shared = [len(one & other) for one, other in combinations(chosen, 2)]
    assert max(shared) < 30
    assert np.mean(shared) == pytest.approx(3000**2 / 768**2, rel=0.4)  # 15.3 for places drawn independently
    changes = []
    torch.manual_seed(0)
    for index in range(3):
        found.place(index)
        with torch.no_grad():
            found.coefficients["k"].normal_()
            changes.append(found.delta_of("k").flatten())
    cosines = [float(one @ other / (one.norm() * other.norm())) for one, other in combinations(changes, 2)]
    assert max(map(abs, cosines)) < 0.006


def test_places_are_the_same_in_every_block_and_differ_between_experiences(backbone: Making) -> None:
    strategy = BiLoRA(backbone(), frequencies=50)
    seen = []
    for index in range(3):
        strategy.expand(Experience(index, 3, range(2 * index, 2 * index + 2)))
        places = [layer.get_buffer(f"positions_{name}") for layer in strategy.layers for name in ("k", "v")]
        assert all(torch.equal(places[0], other) for other in places)
        seen.append(places[0].clone())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    for index, seed in ((0, 777), (2, 797)):  # the released code's seeds
        drawn = torch.randperm(1024, generator=torch.Generator().manual_seed(seed))
        assert seen[index].tolist() == drawn[:50].tolist()


def test_the_weight_holds_the_transforms_of_all_experiences(backbone: Making) -> None:
    strategy = BiLoRA(backbone(), frequencies=100)
    layer = strategy.layers[0]
    expected = layer.weight.double()
    for index in range(3):
        strategy.expand(Experience(index, 3, range(2 * index, 2 * index + 2)))
        with torch.no_grad():
            for coefficients in layer.coefficients.values():
                coefficients.normal_()
        for name, rows in layer.rows.items():
            expected[rows] += layer.delta_of(name).detach()
        strategy.after_training(cast(TrainingData, None))
    torch.testing.assert_close(layer.weight.double(), expected, atol=1e-5, rtol=0)


def test_training_moves_the_weight_by_what_its_coefficients_say(tiny_backbone: Making) -> None:
    strategy = BiLoRA(
        tiny_backbone(), frequencies=100, optimizer=lambda groups: torch.optim.Adam(groups, lr=0.01)
    )
    layer = strategy.layers[1]
    before, learnt = layer.weight.clone(), []

    class Noting(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            learnt.append(layer.effective_weight().detach())

    trainer = StreamTrainer(max_epochs=1, accelerator="cpu", callbacks=[Noting()])
    trainer.run(strategy, Toy(num_classes=4, num_experiences=2, image_size=8, batch_size=8, seed=1))
    moved = (learnt[-1] - before)[32:]
    assert moved.norm() > 0.1
    assert torch.equal(layer.weight[:32], before[:32])  # queries carry no spectrum
    torch.testing.assert_close(layer.weight, learnt[-1], atol=1e-6, rtol=0)


def test_settings_that_train_nothing_are_refused(backbone: Making) -> None:
    with pytest.raises(ValueError, match="0 frequencies at a scale of 300"):
        BiLoRA(backbone(), frequencies=0)
