from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cl_bench.contracts.low_rank import LowRankStrategy, memory_of
from cl_bench.network.backbones import Backbone
from strategies.gainlora import GainLoRA
from strategies.inflora import InfLoRA
from strategies.janus_lora import JanusLoRA
from strategies.linear_probe import LinearProbe
from strategies.lora import LoRA
from strategies.lora_drs import LoRADRS
from strategies.lora_gpm import LoRAGPM
from strategies.split_lora import SplitLoRA

Making = Callable[..., Backbone]


def test_projections_are_counted_over_all_layers(tiny_backbone: Making) -> None:
    strategy = LowRankStrategy(tiny_backbone(), targets=("v", "q", "proj"), rank=2)
    assert strategy.layer_of == [0, 0, 1, 2, 2, 3]
    projections, adapters = zip(*strategy.adapters(), strict=True)
    assert projections == (0, 1, 2, 3, 4, 5)
    assert adapters[3] is strategy.layers[2].adapter("q")


def test_an_added_adapter_shares_the_projection_of_its_rows(tiny_backbone: Making) -> None:
    strategy = LowRankStrategy(tiny_backbone(), targets=("k", "v"), rank=2)
    for layer in strategy.layers:
        layer.add("second", layer.rows["v"], rank=1)
    assert strategy.layer_of == [0, 0, 1, 1]
    assert [projection for projection, _ in strategy.adapters()] == [0, 1, 1, 2, 3, 3]
    found = strategy.of_projections([layer.weight for layer in strategy.layers])
    assert [len(rows) for rows in found] == [32, 32, 32, 32]


def test_matrices_of_layers_are_divided_into_those_of_projections(tiny_backbone: Making) -> None:
    strategy = LowRankStrategy(tiny_backbone(), targets=("q", "v", "fc2"), rank=2, blocks=[1])
    fused, mlp = (layer.weight for layer in strategy.layers)
    found = strategy.of_projections([fused, mlp])
    assert all(map(torch.equal, found, [fused[:32], fused[64:], mlp]))


def test_the_memory_of_a_method_is_found_if_it_keeps_one(tiny_backbone: Making) -> None:
    with_memory = InfLoRA(tiny_backbone(), rank=2)
    assert memory_of(with_memory) is with_memory.memory
    assert memory_of(LoRA(tiny_backbone(), rank=2)) is None
    assert memory_of(LinearProbe(tiny_backbone())) is None


@pytest.mark.parametrize("kind", (GainLoRA, InfLoRA, JanusLoRA, LoRADRS, LoRAGPM, SplitLoRA))
def test_a_memory_of_one_width_is_refused_two_before_training(
    tiny_backbone: Making, kind: type[LowRankStrategy]
) -> None:
    with pytest.raises(ValueError, match=r"inputs of 32 and 128 features.*: leave out fc2"):
        kind(tiny_backbone(), targets=("k", "fc2"), rank=2)
