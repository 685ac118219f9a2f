from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch

from cl_bench.data.experience import Experience
from cl_bench.network.backbones import Backbone
from strategies.slca import SLCA, symmetric_cross_entropy

Making = Callable[..., Backbone]


def test_down_projections_start_as_the_strongest_right_singular_vectors(backbone: Making) -> None:
    strategy = SLCA(backbone(), rank=3)
    strategy.expand(Experience(0, 2, range(2)))
    for _, adapter in strategy.adapters():
        torch.testing.assert_close(adapter.A @ adapter.A.T, torch.eye(3))
        assert not adapter.B.any()
    layer = strategy.layers[0]
    gram = layer.weight.T @ layer.weight
    energy = torch.linalg.eigvalsh(gram)[-3:].sum()
    a = layer.adapter("qkv").A
    torch.testing.assert_close((a @ gram @ a.T).trace(), energy)


def test_adapters_learn_slowly_and_more_slowly_after_the_first_experience(backbone: Making) -> None:
    strategy = SLCA(backbone(), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5))
    for index, expected in enumerate((0.25, 0.05, 0.05)):
        strategy.expand(Experience(index, 3, range(2 * index, 2 * index + 2)))
        optimizer: Any = strategy.configure_optimizers()
        adapters, head = optimizer.param_groups
        assert (adapters["lr"], head["lr"]) == (expected, 0.5)
        assert {id(p) for p in head["params"]} == {id(p) for p in strategy.head.parts[-1].parameters()}


def test_the_symmetric_loss_adds_the_reversed_term() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0]])
    labels = torch.tensor([1])
    forward, reverse = torch.tensor(3.0).log(), 2 / 3 * torch.tensor(1e4).log()
    torch.testing.assert_close(symmetric_cross_entropy(logits, labels, 1.0, 0.0), forward)
    torch.testing.assert_close(
        symmetric_cross_entropy(logits, labels, 0.5, 0.1), 0.5 * forward + 0.1 * reverse
    )


@pytest.mark.parametrize("covariance", ("full", "diagonal"))
def test_alignment_changes_only_the_heads_that_classify(
    backbone: Making, walk: Callable[..., Any], covariance: Literal["full", "diagonal"]
) -> None:
    aligned, plain = (
        SLCA(backbone(), rank=2, covariance=covariance),
        SLCA(backbone(), rank=2, alignment=False),
    )
    assert walk(aligned).losses == walk(plain).losses
    state = aligned.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    for trained, classifying in zip(aligned.head.parts, aligned.head.aligned, strict=True):
        assert not torch.equal(trained.get_parameter("weight"), classifying.get_parameter("weight"))
