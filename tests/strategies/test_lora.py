import pytest
import torch
from torch import Tensor

from cl_bench.data.experience import Experience
from cl_bench.network.backbones import Backbone
from strategies.lora import LoRA

FIRST, SECOND = Experience(0, 2, range(3)), Experience(1, 2, range(3, 5))


class NoData:
    def augmented(self) -> list[tuple[Tensor, Tensor]]:
        return []

    def plain(self) -> list[tuple[Tensor, Tensor]]:
        return []


def strategy(variant: str) -> LoRA:
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return LoRA(Backbone("vision_transformer", "random", options), variant=variant, rank=2)  # type: ignore[arg-type]


def trained(lora: LoRA) -> LoRA:
    """Stand in for training: fill every up-projection with noise."""
    generator = torch.Generator().manual_seed(0)
    for layer in lora.layers:
        for target in layer.rows:
            up = layer.adapter(target).B
            up.data.copy_(0.3 * torch.randn(up.shape, generator=generator))
    return lora


@pytest.mark.parametrize("variant", ("merge", "shared"))
def test_the_next_experience_starts_from_the_function_that_the_last_one_ended_with(variant: str) -> None:
    images = torch.rand(5, 3, 8, 8)
    lora = strategy(variant)
    lora.expand(FIRST)
    before = lora.backbone(images)
    trained(lora)
    learnt = lora.backbone(images)
    assert (learnt - before).abs().max() > 1e-3
    lora.after_training(NoData())
    lora.expand(SECOND)
    torch.testing.assert_close(lora.backbone(images), learnt, atol=1e-5, rtol=0)


def test_merge_starts_a_fresh_adapter_and_shared_keeps_the_one() -> None:
    for variant, fresh in (("merge", True), ("shared", False)):
        lora = strategy(variant)
        lora.expand(FIRST)
        adapter = trained(lora).layers[0].adapter("k")
        down, up = adapter.A.detach().clone(), adapter.B.detach().clone()
        lora.after_training(NoData())
        lora.expand(SECOND)
        assert torch.equal(adapter.A, down) is not fresh
        assert torch.equal(adapter.B, up) is not fresh
        assert not fresh or not adapter.B.any()


def test_state_does_not_grow_with_merged_adapters() -> None:
    lora = strategy("merge")
    lora.expand(FIRST)
    keys = {name for name in lora.state_dict() if "adapters" in name}
    lora.after_training(NoData())
    lora.expand(SECOND)
    assert {name for name in lora.state_dict() if "adapters" in name} == keys
