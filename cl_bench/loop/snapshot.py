"""What a strategy holds beyond its pre-trained backbone, copied out and put back bit by bit."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cl_bench.contracts.strategy import Strategy
from cl_bench.processes.fingerprints import fingerprint, fingerprints
from cl_bench.processes.ranks import OfThisRank, place

Snapshot = dict[str, Any]
"""Tensors, and plain numbers, words, lists and dicts: what ``torch.load(weights_only=True)`` reads."""


class NoPlace(ValueError):
    """A checkpoint holds what the strategy does not make when it is expanded."""


class Pretrained:
    """Remembers the backbone as it was pre-trained, in 8 bytes a row, and tells what has changed since.

    Args:
        strategy: Freshly built.
    """

    def __init__(self, strategy: Strategy) -> None:
        state = strategy.state_dict()
        names = {f"backbone.{name}" for name in strategy.backbone.pretrained_names} & state.keys()
        self._fingerprints = {name: _fingerprints(state[name]) for name in names}

    def changed(self, name: str, tensor: Tensor) -> Tensor | tuple[Tensor, Tensor] | None:
        """Return what of ``tensor`` differs from its pre-trained values, in main memory.

        All of it where it was not pre-trained or has no rows; else the places of its rows that differ (n,)
        with these rows (n, …). None where nothing does.
        """
        if name not in self._fingerprints:
            return _copied(tensor)
        rows = (_fingerprints(tensor) != self._fingerprints[name]).nonzero()[:, 0]
        if len(rows) and tensor.ndim < 2:
            return _copied(tensor)
        return (rows, _copied(tensor[rows.to(tensor.device)])) if len(rows) else None


def snapshot(strategy: Strategy, pretrained: Pretrained) -> Snapshot:
    """Return what ``strategy`` holds beyond its pre-trained backbone; restored, it is the same bit by bit."""
    state = strategy.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {
        "names": list(tensors),
        "tensors": {
            name: difference
            for name, tensor in tensors.items()
            if (difference := pretrained.changed(name, tensor)) is not None
        },
        "extra": {name: value for name, value in state.items() if name not in tensors},
        "trained": [name for name, parameter in strategy.named_parameters() if parameter.requires_grad],
    }


@torch.no_grad()
def restore(strategy: Strategy, saved: Snapshot) -> None:
    """Put a snapshot into a freshly built ``strategy`` that has been expanded as the one it was taken of.

    Raises:
        NoPlace: If the strategy has no place for something that was saved.
    """
    names, tensors = set(saved["names"]), saved["tensors"]
    modules = dict(strategy.named_modules())
    for name in saved["names"]:
        if name in tensors:
            _put(modules, name, tensors[name])
    for name in strategy.state_dict().keys() - names - saved["extra"].keys():
        module, leaf = _place(modules, name)
        module._buffers[leaf] = None
    for name, value in saved["extra"].items():
        _place(modules, name)[0].set_extra_state(value)
    trained = set(saved["trained"])
    for name, parameter in strategy.named_parameters():
        parameter.requires_grad_(name in trained)
    strategy.on_load_checkpoint({})


def own_share(strategy: Strategy) -> dict[str, Tensor]:
    """Return what this process has measured of a sum over all, by name, in main memory."""
    return {
        f"{path}.{name}": _copied(buffer)
        for path, module in strategy.named_modules()
        if isinstance(module, OfThisRank)
        for name, buffer in module.named_buffers(recurse=False)
    }


def take_share(strategy: Strategy, of_others: Sequence[Mapping[str, Tensor]]) -> None:
    """Take up what this process, or those in whose place it is, had measured.

    Args:
        strategy: Restored from what the first process had.
        of_others: Shares of the processes after it. There may be more or fewer of them now.
    """
    rank, world_size = place()
    if world_size == 1 and not of_others:
        return
    shares = [own_share(strategy), *of_others][rank::world_size]
    for path, module in strategy.named_modules():
        if isinstance(module, OfThisRank):
            module.hold([_below(share, f"{path}.") for share in shares])


def _below(share: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in share.items() if name.startswith(prefix)}


def random_states(device: torch.device) -> Snapshot:
    """Return the states of the global random generators of this process, and of its ``device``."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_states(saved: Mapping[str, Any], device: torch.device) -> None:
    """Put them back."""
    random.setstate(saved["python"])
    name, keys, position, has_gauss, gauss = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(saved["cuda"], device)


def _put(modules: Mapping[str, nn.Module], name: str, value: Tensor | tuple[Tensor, Tensor]) -> None:
    """Write into a parameter or buffer, in place where it has the size; a buffer may have grown."""
    module, leaf = _place(modules, name)
    parameter, buffer = module._parameters.get(leaf), module._buffers.get(leaf)
    present = buffer if parameter is None else parameter
    if isinstance(value, tuple):
        rows, values = value
        assert present is not None
        present[rows.to(present.device)] = values.to(present.device)
    elif present is not None and present.shape == value.shape and present.dtype == value.dtype:
        present.copy_(value)
    elif leaf in module._buffers:
        module._buffers[leaf] = value.to(next(iter(modules[""].parameters())).device)
    else:
        raise NoPlace(
            f"A checkpoint holds {name} with shape {tuple(value.shape)}, for which the strategy has no place "
            "after it was expanded: let expand make every parameter and register every buffer."
        )


def _place(modules: Mapping[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    if path not in modules:
        raise NoPlace(
            f"A checkpoint holds {name}, for which the strategy has no place after it was expanded: let "
            "expand make every module."
        )
    return modules[path], leaf


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy in main memory: a part of a larger tensor would be saved with all of it."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _fingerprints(tensor: Tensor) -> Tensor:
    """Return a fingerprint of each row, or one of all where there are no rows, in main memory."""
    return (fingerprint(tensor)[None] if tensor.ndim < 2 else fingerprints(tensor)).cpu()
