"""What a method has added to the pre-trained weights, as a LoRA adapter in the format of PEFT.

Methods merge their adapters, so the factors are found again: the difference of each weight is decomposed,
and as many directions are kept as stand above the rounding of the merges. The scale is 1, since
``lora_alpha`` is ``r``.

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint, and for the names of keys
https://github.com/huggingface/peft, src/peft/utils/save_and_load.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ROUNDING = 1e-6  # of the largest singular value of the weight; float32 rounds a merge at 6e-8 of an entry
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        config: Content of ``adapter_config.json``.
        state: Content of ``adapter_model.safetensors``.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]


def adapter(pretrained: Mapping[str, Tensor], merged: Mapping[str, Tensor], base: str) -> Adapter | str:
    """Return what leads from the ``pretrained`` to the ``merged`` weights as an adapter.

    In words why not, if PEFT's LoRA cannot represent it.

    Args:
        pretrained: State of the transformer before the stream.
        merged: State after it, with the head.
        base: Name of the model that the adapter belongs to.
    """
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, after in merged.items():
        if name.startswith("head.") or torch.equal(after, before := pretrained[name]):
            continue
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or after.ndim != 2:
            return f"{name} has changed, and LoRA changes only the weights of linear layers"
        factors[layer] = down, up = _factors(before, after)
        if down.numel() + up.numel() >= after.numel():
            return f"the change of {name} has rank {len(down)}, and its factors would be as large as it is"
    if not factors:
        return "no weight of the transformer has changed"
    state = {f"{_PREFIX}{name}": merged[name] for name in ("head.weight", "head.bias")}
    for layer, (down, up) in factors.items():
        state[f"{_PREFIX}{layer}.lora_A.weight"] = down
        state[f"{_PREFIX}{layer}.lora_B.weight"] = up
    return Adapter(_config({layer: len(down) for layer, (down, _) in factors.items()}, base), state)


def _factors(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``A`` (r, n) and ``B`` (m, r) whose product is ``after - before`` (m, n) up to rounding."""
    left, values, right = torch.linalg.svd(after.double() - before.double(), full_matrices=False)
    noise = _ROUNDING * torch.linalg.matrix_norm(before.double(), ord=2)
    rank = max(1, int((values > noise).sum()))
    roots = values[:rank].sqrt()
    down, up = roots[:, None] * right[:rank], left[:, :rank] * roots
    return down.float().contiguous(), up.float().contiguous()


def _config(ranks: Mapping[str, int], base: str) -> dict[str, Any]:
    largest = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": list(ranks),
        "modules_to_save": ["head"],
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": dict(ranks),
        "alpha_pattern": dict(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
