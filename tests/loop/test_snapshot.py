from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cl_bench.contracts.strategy import Strategy
from cl_bench.data.experience import Experience
from cl_bench.loop.snapshot import Pretrained, random_states, restore, set_random_states, snapshot
from cl_bench.network.backbones import Backbone
from strategies.lora import LoRA

CPU = torch.device("cpu")


Lora = Callable[[], LoRA]
Trained = tuple[LoRA, Pretrained]


@pytest.fixture
def lora(backbone: Callable[..., Backbone]) -> Lora:
    """Builds a strategy."""
    return lambda: LoRA(backbone(), rank=2)


def experience(index: int) -> Experience:
    return Experience(index, 2, range(3 * index, 3 * index + 3))


@pytest.fixture
def trained(lora: Lora) -> Trained:
    """A strategy whose adapters are not zero, and whose rows of values were merged."""
    strategy = lora()
    pretrained = Pretrained(strategy)
    strategy.expand(experience(0))
    for layer in strategy.layers:
        nn.init.normal_(layer.adapter("v").B)
        layer.merge()
    strategy.expand(experience(1))
    for layer in strategy.layers:
        nn.init.normal_(layer.adapter("k").B)
    return strategy, pretrained


def same(one: Strategy, other: Strategy) -> bool:
    mine, its = one.state_dict(), other.state_dict()
    return mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)


def test_a_snapshot_is_restored_bit_by_bit_into_a_fresh_strategy(trained: Trained, lora: Lora) -> None:
    strategy, pretrained = trained
    fresh = lora()
    for index in range(2):
        fresh.expand(experience(index))
    assert not same(strategy, fresh)
    restore(fresh, snapshot(strategy, pretrained))
    assert same(strategy, fresh)
    flags = [{n: p.requires_grad for n, p in each.named_parameters()} for each in (strategy, fresh)]
    assert flags[0] == flags[1]


def test_it_holds_only_the_merged_rows_of_the_backbone(trained: Trained) -> None:
    strategy, pretrained = trained
    tensors = snapshot(strategy, pretrained)["tensors"]
    held = {name: value for name, value in tensors.items() if ".adapters." not in name and "backbone" in name}
    assert set(held) == {f"backbone.vit.blocks.{block}.attn.qkv.weight" for block in range(2)}
    for rows, values in held.values():
        assert rows.tolist() == list(range(64, 96))  # a third of the fused layer: the values
        assert values.shape == (32, 32)


def test_a_change_of_a_single_bit_is_detected(lora: Lora) -> None:
    strategy = lora()
    pretrained = Pretrained(strategy)
    weight = strategy.layers[0].weight
    weight[5].view(torch.int32)[7] ^= 1
    found = pretrained.changed("backbone.vit.blocks.0.attn.qkv.weight", weight)
    assert isinstance(found, tuple)
    assert found[0].tolist() == [5]


def test_a_pretrained_vector_that_changed_is_restored_whole(lora: Lora) -> None:
    strategy, fresh = lora(), lora()
    pretrained = Pretrained(strategy)
    norm = strategy.backbone.vit.get_submodule("norm")
    assert isinstance(norm.bias, Tensor)
    norm.bias.data += torch.arange(32.0)
    for each in (strategy, fresh):
        each.expand(experience(0))
    restore(fresh, snapshot(strategy, pretrained))
    assert same(strategy, fresh)


def test_a_buffer_that_has_grown_or_is_gone_is_restored(lora: Lora) -> None:
    strategy, fresh = lora(), lora()
    for each in (strategy, fresh):
        each.register_buffer("grows", torch.zeros(1))
        each.register_buffer("goes", torch.ones(2))
        each.expand(experience(0))
    strategy.grows = torch.arange(5.0)
    strategy._buffers["goes"] = None
    restore(fresh, snapshot(strategy, Pretrained(strategy)))
    assert isinstance(fresh.grows, Tensor)
    assert torch.equal(fresh.grows, torch.arange(5.0))
    assert fresh.goes is None


def test_what_expand_does_not_make_is_refused_by_name(lora: Lora) -> None:
    strategy, fresh = lora(), lora()
    strategy.register_parameter("late", nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match=r"no place for late with shape \(3,\)"):
        restore(fresh, snapshot(strategy, Pretrained(strategy)))
    strategy = lora()
    strategy.late = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"no place for late\.\w+ with shape"):
        restore(fresh, snapshot(strategy, Pretrained(strategy)))


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_every_generator_continues_from_its_saved_state() -> None:
    np.random.randn()  # keeps a second number for the next call
    saved = random_states(CPU)
    first = draws()
    assert draws() != first
    set_random_states(saved, CPU)
    assert draws() == first
