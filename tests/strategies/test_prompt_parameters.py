"""The numbers of prompt parameters that papers and ports print, on ViT-B/16 without its weights."""

from __future__ import annotations

import copy

import pytest

from cl_bench.contracts.prompted import PromptedStrategy
from cl_bench.data.experience import Experience
from cl_bench.network.backbones import Backbone
from strategies.coda_prompt import CODAPrompt
from strategies.dualprompt import DualPrompt
from strategies.l2p import L2P


@pytest.fixture(scope="module")
def vit() -> Backbone:
    return Backbone("vit_base_patch16_224.augreg_in21k", "random")


@pytest.mark.parametrize(
    ("kind", "printed", "of_each"),
    (
        (L2P, 46_080, 46_080),  # one pool, trained throughout
        (DualPrompt, 253_440, 15_360 + 23_040 + 768),  # general prefix, expert and key
        (CODAPrompt, 3_840_000, 384_000),
    ),
)
def test_prompts_of_ten_experiences_have_as_many_parameters_as_printed(
    vit: Backbone, kind: type[PromptedStrategy], printed: int, of_each: int
) -> None:
    strategy = kind(copy.deepcopy(vit))
    for index in range(10):
        strategy.expand(Experience(index, 10, range(index * 10, (index + 1) * 10)))
        assert strategy.trainable_parameters == of_each + 10 * 769
    backbone, head = (sum(p.numel() for p in part.parameters()) for part in (vit, strategy.head))
    assert sum(p.numel() for p in strategy.parameters()) - backbone - head == printed
