import re

import pytest
import torch
from torch import Tensor

from cl_bench.export.adapter import Adapter, adapter

HEAD = {"head.weight": torch.ones(3, 8), "head.bias": torch.zeros(3)}


def pretrained() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "blocks.0.attn.qkv.weight": torch.randn(24, 8, generator=generator),
        "blocks.0.attn.qkv.bias": torch.zeros(24),
        "blocks.0.mlp.fc1.weight": torch.randn(16, 8, generator=generator),
    }


def changed(**additions: Tensor) -> dict[str, Tensor]:
    """The state after a stream that has added something to ``qkv``, ``fc1`` or ``bias``."""
    state = pretrained()
    names = {"qkv": "attn.qkv.weight", "fc1": "mlp.fc1.weight", "bias": "attn.qkv.bias"}
    for name, addition in additions.items():
        state[f"blocks.0.{names[name]}"] += addition
    return state | HEAD


def test_products_that_were_merged_one_by_one_are_found_again() -> None:
    generator = torch.Generator().manual_seed(1)
    state = changed()
    total = torch.zeros(24, 8)
    for _ in range(3):  # each merge rounds
        product = torch.randn(24, 1, generator=generator) @ torch.randn(1, 8, generator=generator) / 10
        state["blocks.0.attn.qkv.weight"] += product
        total += product
    found = adapter(pretrained(), state, "base")
    assert isinstance(found, Adapter)
    prefix = "base_model.model.blocks.0.attn.qkv"
    down, up = found.state[f"{prefix}.lora_A.weight"], found.state[f"{prefix}.lora_B.weight"]
    assert (down.shape, up.shape) == ((3, 8), (24, 3))
    torch.testing.assert_close(up @ down, total, rtol=0, atol=3e-6)
    assert found.config["target_modules"] == ["blocks.0.attn.qkv"]


def test_layers_of_unequal_rank_have_patterns_that_keep_the_scale_at_one() -> None:
    qkv, fc1 = torch.zeros(24, 8), torch.zeros(16, 8)
    qkv[0, 0] = qkv[1, 1] = 1.0
    fc1[3, 2] = 1.0
    found = adapter(pretrained(), changed(qkv=qkv, fc1=fc1), "base")
    assert isinstance(found, Adapter)
    ranks = {"blocks.0.attn.qkv": 2, "blocks.0.mlp.fc1": 1}
    assert found.config["rank_pattern"] == found.config["alpha_pattern"] == ranks
    assert (found.config["r"], found.config["lora_alpha"], found.config["use_rslora"]) == (2, 2, False)


def test_the_head_goes_along_as_a_module_to_save() -> None:
    fc1 = torch.zeros(16, 8)
    fc1[3, 2] = 1.0
    found = adapter(pretrained(), changed(fc1=fc1), "base")
    assert isinstance(found, Adapter)
    assert found.config["modules_to_save"] == ["head"]
    assert torch.equal(found.state["base_model.model.head.weight"], HEAD["head.weight"])


@pytest.mark.parametrize(
    ("additions", "reason"),
    (
        ({}, "no weight of the transformer has changed"),
        (
            {"bias": torch.ones(24)},
            r"blocks\.0\.attn\.qkv\.bias has changed, and LoRA changes only the weights",
        ),
        ({"qkv": torch.randn(24, 8)}, r"qkv\.weight has rank 8, and its factors would be as large as it is"),
    ),
    ids=("nothing", "bias", "full rank"),
)
def test_what_lora_cannot_represent_is_returned_in_words(additions: dict[str, Tensor], reason: str) -> None:
    found = adapter(pretrained(), changed(**additions), "base")
    assert isinstance(found, str)
    assert re.search(reason, found)
