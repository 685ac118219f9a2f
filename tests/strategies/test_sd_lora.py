from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cl_bench.data.experience import Experience
from cl_bench.network.backbones import Backbone
from strategies.lora import LoRA
from strategies.sd_lora import SDLoRA

Walking = Callable[..., Any]
Making = Callable[..., Backbone]


def entered(strategy: Any, index: int) -> None:
    strategy.expand(Experience(index, 9, range(2 * index, 2 * index + 2)))


def learn(strategy: Any, index: int) -> None:
    """Enter an experience, and write random numbers where training would have."""
    entered(strategy, index)
    generator = torch.Generator().manual_seed(index)
    with torch.no_grad():
        for _, adapter in strategy.adapters():
            adapter.B.copy_(torch.randn(adapter.B.shape, generator=generator))


def sd_lora(backbone: Making, experiences: int = 3, **settings: Any) -> SDLoRA:
    strategy = SDLoRA(backbone(), **{"rank": 3} | settings)
    for index in range(experiences):
        learn(strategy, index)
    return strategy


def dense(strategy: SDLoRA) -> list[list[Tensor]]:
    """Return the direction (m, n) of every experience in each projection, formed by hand, newest last."""
    found = []
    for layer in strategy.layers:
        for name in layer.rows:
            down, up = layer.factors(name)
            owner = torch.cat([layer.owner, layer.owner.new_full((3,), len(layer.magnitudes) - 1)])
            each = [up[:, owner == index] @ down[owner == index] for index in range(len(layer.magnitudes))]
            found.append([product.detach().double() for product in each])
    return found


def weights(strategy: SDLoRA) -> list[Tensor]:
    return [layer.effective_weight().detach() for layer in strategy.layers]


def test_a_layer_computes_the_sum_of_its_directions_times_their_magnitudes(backbone: Making) -> None:
    strategy = sd_lora(backbone)
    with torch.no_grad():
        strategy.magnitudes.copy_(torch.tensor([0.5, -2.0, 3.0]))
    layer = strategy.layers[0]
    whole = layer.weight.double()
    for rows, directions in zip(layer.rows.values(), dense(strategy), strict=False):
        for magnitude, direction in zip((0.5, -2.0, 3.0), directions, strict=True):
            whole[rows] += magnitude * direction
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(9))
    assert layer.bias is not None
    torch.testing.assert_close(layer(x).double(), x.double() @ whole.T + layer.bias, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(layer.effective_weight().double(), whole, atol=1e-5, rtol=1e-5)


def test_merged_directions_are_added_once(backbone: Making) -> None:
    strategy = sd_lora(backbone)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        before = strategy.features(images)
        for layer in strategy.layers:
            layer.merge()
        torch.testing.assert_close(strategy.features(images), before, atol=1e-4, rtol=1e-4)
    assert all(not layer.owner.numel() for layer in strategy.layers)


def test_the_gradient_of_a_magnitude_is_that_of_the_weight_along_its_direction(backbone: Making) -> None:
    strategy = sd_lora(backbone)
    layer = strategy.layers[0]
    generator = torch.Generator().manual_seed(9)
    x, of_y = torch.randn(5, 32, generator=generator), torch.randn(5, 96, generator=generator)
    layer(x).backward(of_y)
    of_weight = (of_y.T @ x).double()
    expected = [
        sum(
            (of_weight[rows] * directions[index]).sum()
            for rows, directions in zip(layer.rows.values(), dense(strategy), strict=False)
        )
        for index in range(3)
    ]
    assert layer.magnitudes.grad is not None
    torch.testing.assert_close(
        layer.magnitudes.grad.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4
    )


def test_old_magnitudes_are_trained_and_old_directions_are_not(backbone: Making, walk: Walking) -> None:
    strategy = SDLoRA(backbone(), rank=3, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    walk(strategy, max_epochs=1)
    kept = {name: buffer.clone() for name, buffer in strategy.named_buffers() if "down_" in name}
    images, labels = torch.rand(4, 3, 16, 16), torch.tensor([4, 5, 4, 5])
    strategy.batch_loss((images, labels)).backward()
    assert strategy.magnitudes.grad is not None
    assert strategy.magnitudes.grad.shape == (3,)
    assert (strategy.magnitudes.grad != 0).all()
    assert all(torch.equal(kept[name], buffer) for name, buffer in strategy.named_buffers() if name in kept)
    assert not any("down_" in name for name, _ in strategy.named_parameters())


def test_a_finished_direction_has_length_one_and_the_function_stays(backbone: Making) -> None:
    strategy = sd_lora(backbone)
    before = weights(strategy)
    entered(strategy, 3)
    for index in range(3):
        length = sum(directions[index].square().sum() for directions in dense(strategy))
        assert float(length) == pytest.approx(1, abs=1e-5)
    for old, new in zip(before, weights(strategy), strict=True):
        torch.testing.assert_close(new, old, atol=2e-5, rtol=0)


def test_every_product_has_length_one_as_in_the_paper(backbone: Making) -> None:
    strategy = sd_lora(backbone, norm="matrix")
    products = dense(strategy)
    lengths = [float(directions[2].norm()) for directions in products]
    entered(strategy, 3)
    for directions in dense(strategy):
        assert [float(one.norm()) for one in directions] == pytest.approx([1, 1, 1, 0], abs=1e-5)
    # The magnitude nearest to what was learnt, by NumPy's least squares.
    unit = np.concatenate([(one[2] / one[2].norm()).flatten().numpy() for one in products])
    learnt = np.concatenate([one[2].flatten().numpy() for one in products])
    assert np.std(lengths) > 0.1
    assert strategy.magnitudes[2].item() == pytest.approx(
        np.linalg.lstsq(unit[:, None], learnt, rcond=None)[0][0], rel=1e-5
    )


def test_as_released_all_magnitudes_start_anew_and_the_function_jumps(backbone: Making) -> None:
    strategy = sd_lora(backbone, norm="factors", magnitude=0.8, restart=True)
    assert strategy.promises.start_within is None
    pairs = [(adapter.B.detach(), adapter.A.detach()) for _, adapter in strategy.adapters()]
    before = weights(strategy)
    entered(strategy, 3)
    assert strategy.magnitudes.tolist() == pytest.approx([0.8] * 4)
    ratios = [directions[2] for directions in dense(strategy)]
    for found, (B, A) in zip(ratios, pairs, strict=True):
        torch.testing.assert_close(found.float(), B @ A / (B.norm() * A.norm()), atol=1e-6, rtol=1e-5)
        assert found.norm() <= 1
    jump = weights(strategy)[0] - before[0]
    for rows, (B, A) in zip(strategy.layers[0].rows.values(), pairs, strict=False):
        torch.testing.assert_close(
            jump[rows], 0.8 * B @ A * (1 / (B.norm() * A.norm()) - 1), atol=1e-5, rtol=1e-4
        )


def test_the_first_experience_as_released_is_lora_at_its_magnitude(backbone: Making) -> None:
    strategy = sd_lora(backbone, 1, magnitude=0.8)
    lora = LoRA(backbone(), targets=("q", "v"), rank=3, scale=0.8)
    entered(lora, 0)
    with torch.no_grad():
        for (_, own), (_, other) in zip(strategy.adapters(), lora.adapters(), strict=True):
            other.A.copy_(own.A)
            other.B.copy_(own.B)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(strategy.features(images), lora.features(images), atol=1e-5, rtol=1e-5)


def test_ranks_fall_where_the_limits_begin(backbone: Making) -> None:
    strategy = SDLoRA(backbone(), rank=5, rank_limits=[(1, 4), (3, 2)])
    ranks = []
    for index in range(4):
        learn(strategy, index)
        ranks.append({len(adapter.A) for _, adapter in strategy.adapters()})
    assert ranks == [{5}, {4}, {4}, {2}]
    assert strategy.layers[0].owner.bincount().tolist() == [5, 4, 4]


def test_a_direction_that_older_ones_contain_is_absorbed(backbone: Making) -> None:
    strategy = sd_lora(backbone, 2, absorb_below=1e-6)
    entered(strategy, 2)
    strategy.magnitudes.data.copy_(torch.tensor([0.5, 2.0, 1.5]))
    with torch.no_grad():  # the newest product is 4 times the first direction in every projection
        for layer in strategy.layers:
            for name in layer.rows:
                down, up = (layer.get_buffer(f"{side}_{name}") for side in ("down", "up"))
                layer.adapter(name).A.copy_(down[:3])
                layer.adapter(name).B.copy_(4 * up[:, :3])
    before = weights(strategy)
    entered(strategy, 3)
    assert strategy.magnitudes.tolist() == pytest.approx([0.5 + 1.5 * 4, 2.0, 0.0, 1.0], abs=1e-4)
    assert strategy.layers[0].owner.tolist() == [0, 0, 0, 1, 1, 1]
    for old, new in zip(before, weights(strategy), strict=True):
        torch.testing.assert_close(new, old, atol=1e-5, rtol=0)


def test_what_is_absorbed_is_the_least_squares_solution_over_the_whole_model(backbone: Making) -> None:
    strategy = sd_lora(backbone, absorb_below=1.0)  # anything that older directions reach at all
    strategy.magnitudes.data.copy_(torch.tensor([1.0, 1.0, 3.0]))
    stacked = np.stack(
        [np.concatenate([one[i].flatten().numpy() for one in dense(strategy)]) for i in range(3)]
    )
    solution = np.linalg.lstsq(stacked[:2].T, 3 * stacked[2], rcond=None)[0]
    entered(strategy, 3)
    assert strategy.magnitudes.tolist() == pytest.approx([*(1 + solution), 0.0, 1.0], rel=1e-4)


def test_restarted_magnitudes_cannot_hold_what_was_absorbed(backbone: Making) -> None:
    with pytest.raises(ValueError, match="leave out restart or absorb_below"):
        SDLoRA(backbone(), restart=True, absorb_below=9e-4)


def test_a_direction_that_older_ones_do_not_contain_is_kept(backbone: Making) -> None:
    strategy = sd_lora(backbone, 3, absorb_below=9e-4)
    entered(strategy, 3)
    assert strategy.layers[0].owner.bincount().tolist() == [3, 3, 3]
