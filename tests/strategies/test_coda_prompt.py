from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cl_bench.data.experience import Experience
from cl_bench.network.backbones import Backbone
from strategies.coda_prompt import CODAPrompt

Making = Callable[..., Backbone]


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def drawn(backbone: Backbone, experiences: int = 2, **settings: Any) -> CODAPrompt:
    """Some of three experiences, each with two of seven components for both blocks, in double precision."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"pool": 7, "length": 4, "blocks": [0, 1]}
    strategy = CODAPrompt(backbone, **arguments | settings)
    for index in range(experiences):
        strategy.expand(Experience(index, 3, range(2 * index, 2 * index + 2)))
    return strategy.double()


def rows(strategy: CODAPrompt, block: int = 0) -> list[Tensor]:
    """All components of a block, as rows: of P, K and A."""
    parts = [
        (part.prompts[block].flatten(1), part.keys[block], part.attention[block])
        for part in strategy.components
    ]
    return [torch.cat(one).detach() for one in zip(*parts, strict=True)]


def composed(strategy: CODAPrompt, query: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Keys and values of an image by the definition, component by component, in NumPy."""
    q, total = query.numpy(), np.zeros((4, 32))
    for prompt, key, attention in zip(*(one.numpy() for one in rows(strategy, block)), strict=True):
        attended = q * attention
        weight = attended @ key / (np.linalg.norm(attended) * np.linalg.norm(key))
        total += weight * prompt.reshape(4, 32)
    return torch.from_numpy(total[:2]), torch.from_numpy(total[2:])


def test_features_are_those_of_a_transformer_written_by_hand(
    tiny_backbone: Making, by_hand: Callable[..., Tensor]
) -> None:
    strategy = drawn(tiny_backbone())
    for part in strategy.components:  # no longer orthonormal, as after training
        for parameter in part.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    expected = []
    for image in images():
        query = by_hand(strategy.backbone.vit, image)[0]
        prefixes = {block: composed(strategy, query, block) for block in (0, 1)}
        expected.append(by_hand(strategy.backbone.vit, image, prefixes=prefixes)[0])
    found = strategy.features(images()).pooled
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-12)


def test_new_components_are_orthonormal_and_orthogonal_to_what_was_trained(
    backbone: Making, walk: Callable[..., Any]
) -> None:
    strategy = CODAPrompt(backbone(), pool=7, length=4, blocks=[0, 1])
    walk(strategy)
    strategy.parts = strategy.parts[:2]
    strategy.expand(Experience(2, 3, range(6, 8)))
    for block in (0, 1):
        for all_rows in rows(strategy, block):
            assert len(all_rows) == 3 * 2
            products = all_rows[4:].double() @ all_rows.double().T
            expected = torch.eye(6, dtype=torch.float64)[4:]
            torch.testing.assert_close(products, expected, rtol=0, atol=1e-5)
            assert (all_rows[:2] @ all_rows[2:4].T).abs().max() > 1e-4  # training made the old ones overlap


def test_an_experience_trains_its_own_components_only(backbone: Making, walk: Callable[..., Any]) -> None:
    kept: list[list[Tensor]] = []

    class Watched(CODAPrompt):
        def after_training(self, data: Any) -> None:
            kept.append([p.detach().clone() for p in self.parts.parameters()])

    strategy = Watched(backbone(), pool=6, length=2, blocks=[1])
    walk(strategy)
    for then in kept:
        now = list(strategy.parts.parameters())[: len(then)]
        assert all(torch.equal(one, other) for one, other in zip(now, then, strict=True))
    trained = {name for name, parameter in strategy.parts.named_parameters() if parameter.requires_grad}
    assert trained == {"2.prompts", "2.keys", "2.attention"}


def test_old_components_stay_part_of_the_prefix(tiny_backbone: Making) -> None:
    strategy = drawn(tiny_backbone())
    before = strategy.features(images()).pooled
    strategy.components[0].prompts.data.zero_()
    assert (strategy.features(images()).pooled - before).abs().max() > 1e-3


# The penalty


def test_the_penalty_of_an_orthonormal_pool_is_zero(tiny_backbone: Making) -> None:
    assert drawn(tiny_backbone(), experiences=3).penalty().item() < 1e-12


def test_the_penalty_is_the_mean_squared_entry_of_the_gram_matrix_minus_one(tiny_backbone: Making) -> None:
    strategy = drawn(tiny_backbone(), orthogonality=0.1)
    strategy.components[1].keys.data *= 2  # in both blocks, two of four diagonal entries are 4
    assert strategy.penalty().item() == pytest.approx(2 * 2 * (4 - 1) ** 2 / 4**2)
    features, labels = strategy.features(images()), torch.tensor([2, 3, 2])
    weighted = strategy.loss(features, labels)
    strategy.orthogonality = 0.0
    assert (weighted - strategy.loss(features, labels)).item() == pytest.approx(0.1 * 9 / 4)


def test_the_penalty_moves_no_old_component(tiny_backbone: Making) -> None:
    strategy = drawn(tiny_backbone())
    strategy.components[1].keys.data += 0.5
    strategy.penalty().backward()
    assert all(parameter.grad is None for parameter in strategy.components[0].parameters())
    assert strategy.components[1].keys.grad is not None and strategy.components[1].keys.grad.any()


# What is refused


@pytest.mark.parametrize(
    ("settings", "error"),
    (
        ({"pool": 4, "length": 5}, "length 5 has no equal halves"),
        ({"pool": 33}, "33 keys of width 32 cannot be orthogonal: set pool to at most 32"),
    ),
)
def test_components_that_cannot_be_are_refused(
    settings: dict[str, Any], error: str, tiny_backbone: Making
) -> None:
    with pytest.raises(ValueError, match=error):
        CODAPrompt(tiny_backbone(), **settings)


def test_a_pool_smaller_than_the_stream_is_refused(tiny_backbone: Making) -> None:
    with pytest.raises(ValueError, match=r"pool of 2 components is too small for 3 .* at least 3"):
        drawn(tiny_backbone(), experiences=1, pool=2)
