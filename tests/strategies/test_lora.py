from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from cl_bench.data.experience import Experience
from cl_bench.network.backbones import Backbone
from strategies.lora import LoRA

Making = Callable[..., Backbone]
FIRST, SECOND = Experience(0, 2, range(3)), Experience(1, 2, range(3, 5))


class NoData:
    def augmented(self) -> list[tuple[Tensor, Tensor]]:
        return []

    def plain(self) -> list[tuple[Tensor, Tensor]]:
        return []


def trained(lora: LoRA) -> LoRA:
    """Stand in for training: fill every up-projection with noise."""
    generator = torch.Generator().manual_seed(0)
    for _, adapter in lora.adapters():
        adapter.B.data.copy_(0.3 * torch.randn(adapter.B.shape, generator=generator))
    return lora


@pytest.mark.parametrize("variant", ("merge", "shared"))
def test_the_next_experience_starts_from_the_function_that_the_last_one_ended_with(
    variant: Literal["merge", "shared"], tiny_backbone: Making
) -> None:
    images = torch.rand(5, 3, 8, 8)
    lora = LoRA(tiny_backbone(), variant=variant, rank=2)
    lora.expand(FIRST)
    before = lora.backbone(images)
    trained(lora)
    learnt = lora.backbone(images)
    assert (learnt - before).abs().max() > 1e-3
    lora.after_training(NoData())
    lora.expand(SECOND)
    torch.testing.assert_close(lora.backbone(images), learnt, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("variant", "fresh"), (("merge", True), ("shared", False)))
def test_merge_starts_a_fresh_adapter_and_shared_keeps_its_own(
    variant: Literal["merge", "shared"], fresh: bool, tiny_backbone: Making
) -> None:
    lora = LoRA(tiny_backbone(), variant=variant, rank=2)
    lora.expand(FIRST)
    adapter = trained(lora).layers[0].adapter("k")
    down, up = adapter.A.detach().clone(), adapter.B.detach().clone()
    lora.after_training(NoData())
    lora.expand(SECOND)
    assert torch.equal(adapter.A, down) is not fresh
    assert torch.equal(adapter.B, up) is not fresh
    assert not fresh or not adapter.B.any()


def test_state_does_not_grow_with_merged_adapters(tiny_backbone: Making) -> None:
    lora = LoRA(tiny_backbone(), rank=2)
    lora.expand(FIRST)
    keys = {name for name in lora.state_dict() if "adapters" in name}
    lora.after_training(NoData())
    lora.expand(SECOND)
    assert {name for name in lora.state_dict() if "adapters" in name} == keys
