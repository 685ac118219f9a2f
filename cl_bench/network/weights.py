"""Checkpoints of a backbone: read without running code, compared key by key, and hashed."""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_CLASSIFIERS = ("head.", "head_dist.")
_UNREADABLE = (
    safetensors.SafetensorError,
    RuntimeError,  # and RecursionError
    EOFError,
    OSError,
    MemoryError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
)


def load(vit: nn.Module, file: Path, model: str, *, resample: bool = False) -> None:
    """Copy the tensors of ``file`` into ``vit``; every key and shape must agree, except for a classifier.

    With ``resample``, the position embedding may have another grid of patches and is resampled to that of
    ``vit``, as timm does with weights that it downloads.

    Raises:
        ValueError: If the file does not hold dense, finite floating-point tensors by name that fit.
    """
    state = _without_classifier(_state_dict(file), vit)
    if resample:
        state = _resampled(state, vit)
    problems = _problems(state, vit.state_dict())
    if problems:
        made_with = ", ".join(f"{name} {value}" for name, value in _options_of(state).items())
        raise ValueError(
            f"{file} does not fit {model}: {'; '.join(problems)}. "
            "Choose the model and the options that it was made with"
            + (f": its shapes fit {made_with}." if made_with else ".")
        )
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"{file} holds {key} as {tensor.dtype}, and weights are floating-point numbers: "
                "save the state dict of the model before it was quantised or converted."
            )
        if not bool(tensor.float().isfinite().all()):
            raise ValueError(
                f"{file} holds numbers in {key} that are not finite, as if its training had diverged: "
                "take an earlier checkpoint."
            )
    vit.load_state_dict(state)


def _state_dict(file: Path) -> dict[str, Tensor]:
    """Read the tensors of ``file`` by name, without running anything that it may contain."""
    content = _content(file)
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(
            f"{file} does not hold tensors by name, at its top or under state_dict or model: "
            "save only the state dict of the model."
        )
    for key, tensor in content.items():
        if not isinstance(key, str):
            raise ValueError(
                f"{file} holds a tensor under {key!r}, which is not a name: save the state dict of the model."
            )
        if kind := _unusual(tensor):
            raise ValueError(
                f"{file} holds {key} as {kind}: save the state dict of the model as ordinary dense tensors."
            )
    return dict(content)


def _unusual(tensor: Tensor) -> str | None:
    """Return in words what keeps a tensor from being copied number by number; None if nothing does."""
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"a sparse tensor ({tensor.layout})"
    if tensor.is_meta:
        return "a tensor without numbers, on the device meta"
    return None


def _content(file: Path) -> Any:
    if file.suffix not in _SUFFIXES:
        suffixes = f"{', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}"
        raise ValueError(f"{file} is not named like a checkpoint: give a file that ends in {suffixes}.")
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors, and reading it could run code: "
            "if you trust it, save its state dict as .safetensors and give that file."
        ) from error
    except _UNREADABLE as error:
        why = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(
            f"{file} cannot be read as a checkpoint ({why}): check that it is complete."
        ) from error


def _without_classifier(state: Mapping[str, Tensor], vit: nn.Module) -> dict[str, Tensor]:
    own = vit.state_dict()
    return {key: tensor for key, tensor in state.items() if key in own or not key.startswith(_CLASSIFIERS)}


def _resampled(state: Mapping[str, Tensor], vit: nn.Module) -> dict[str, Tensor]:
    """Return ``state`` with its position embedding (1, P, d) on the grid of patches of ``vit``."""
    model: Any = vit
    size, prefix = list(model.patch_embed.grid_size), model.num_prefix_tokens
    positions = state["pos_embed"].to(
        model.pos_embed.dtype
    )  # a checkpoint in half precision is not rounded again
    positions = resample_abs_pos_embed(positions, size, num_prefix_tokens=prefix)
    return {**state, "pos_embed": positions}


def _problems(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Return one phrase for each way in which the two differ, naming the first keys."""
    missing = [f"{key} {tuple(own[key].shape)}" for key in own if key not in state]
    unexpected = [f"{key} {tuple(state[key].shape)}" for key in state if key not in own]
    reshaped = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    return [f"{what}: {_first(keys)}" for what, keys in found.items() if keys]


def _first(keys: Sequence[str], shown: int = 3) -> str:
    rest = len(keys) - shown
    return ", ".join(keys[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _options_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the options of a plain ViT that its shapes show; the number of heads does not show."""
    patches, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    if patches is None or positions is None:
        return {}
    patch_size = patches.shape[-1]
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    return {
        # Class and register tokens are too few to complete another row of patches.
        "img_size": math.isqrt(positions.shape[1]) * patch_size,
        "patch_size": patch_size,
        "embed_dim": patches.shape[0],
        "depth": len(blocks),
    }


def sha256_of_file(file: Path) -> str:
    """Return the sha256 of the bytes of ``file``."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_tensors(module: nn.Module) -> str:
    """Return the sha256 over names, types, shapes and bytes of the state, by name."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha256.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()
