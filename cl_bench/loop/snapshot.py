"""Everything that a strategy holds beyond its pre-trained backbone, copied and restored bit by bit."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl_bench.contracts.strategy import Strategy
from cl_bench.processes.fingerprints import fingerprint, fingerprints
from cl_bench.processes.ranks import OfThisRank, place
from cl_bench.processes.state import NoPlace, put

Snapshot = dict[str, Any]
"""Tensors, numbers, strings, lists and dicts, which ``torch.load(weights_only=True)`` can read."""


class Pretrained:
    """Fingerprints of the pre-trained backbone, 8 bytes for each row, which detect later changes.

    Args:
        strategy: Freshly built.
    """

    def __init__(self, strategy: Strategy) -> None:
        state = strategy.state_dict()
        names = {f"backbone.{name}" for name in strategy.backbone.pretrained_names} & state.keys()
        self._fingerprints = {name: _fingerprints(state[name]) for name in names}

    def changed(self, name: str, tensor: Tensor) -> Tensor | tuple[Tensor, Tensor] | None:
        """Return the difference of ``tensor`` from its pre-trained values, in main memory.

        The whole tensor if it was not pre-trained or has no rows; otherwise the indices (n,) of the rows that
        differ, and these rows (n, …). None if nothing differs.
        """
        if name not in self._fingerprints:
            return _copied(tensor)
        rows = (_fingerprints(tensor) != self._fingerprints[name]).nonzero()[:, 0]
        if len(rows) and tensor.ndim < 2:
            return _copied(tensor)
        return (rows, _copied(tensor[rows.to(tensor.device)])) if len(rows) else None


def snapshot(strategy: Strategy, pretrained: Pretrained) -> Snapshot:
    """Return everything that ``strategy`` holds beyond its pre-trained backbone, bit by bit."""
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
    """Put a snapshot into a freshly built ``strategy`` that has been expanded as the saved one was.

    Raises:
        NoPlace: If the strategy has no place for something that was saved.
    """
    state, modules = strategy.state_dict(), dict(strategy.named_modules())
    for name, value in saved["tensors"].items():
        if not isinstance(value, Tensor):
            rows, values = (part.to(state[name].device) for part in value)
            value = state[name].to(values.dtype).index_copy(0, rows, values)
        put(strategy, name, value)
    for name in state.keys() - set(saved["names"]) - saved["extra"].keys():
        put(strategy, name, None)
    for name, value in saved["extra"].items():
        if (owner := modules.get(name.rpartition(".")[0])) is None:
            raise NoPlace(name)
        owner.set_extra_state(value)
    trained = set(saved["trained"])
    for name, parameter in strategy.named_parameters():
        parameter.requires_grad_(name in trained)
    strategy.on_load_checkpoint({})


def own_share(strategy: Strategy) -> dict[str, Tensor]:
    """Return this process's share of every sum over processes, by name, in main memory."""
    return {
        f"{path}.{name}": _copied(buffer)
        for path, module in strategy.named_modules()
        if isinstance(module, OfThisRank)
        for name, buffer in module.named_buffers(recurse=False)
    }


def take_share(strategy: Strategy, of_others: Sequence[Mapping[str, Tensor]]) -> None:
    """Give this process its share of the sums over the processes of an earlier attempt.

    Args:
        strategy: Restored with the share of the first process.
        of_others: Shares of the other processes. Now there may be more or fewer of these.
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
    """Restore the states that :func:`random_states` returned."""
    random.setstate(saved["python"])
    name, keys, position, has_gauss, gauss = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(saved["cuda"], device)


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy in main memory: a part of a larger tensor would be saved with all of it."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _fingerprints(tensor: Tensor) -> Tensor:
    """Return a fingerprint of each row, or one of the whole tensor if it has no rows, in main memory."""
    return (fingerprint(tensor)[None] if tensor.ndim < 2 else fingerprints(tensor)).cpu()
