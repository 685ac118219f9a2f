"""What the processes of one run share: sums over all of them, and state that is equal on each, bit for bit.

A run has one process for each device. The processes hold the same model, and process r, its *rank*, takes the
r-th part of every batch. Without a process group, everything here is that of a single process, and costs
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from cl_bench.processes.fingerprints import fingerprint
from cl_bench.processes.state import put

_FAILURE = "cl-bench/failure"
_ABANDONED = "by peer"  # how gloo says that a process is gone
_WITHOUT_A_WORD = (
    "Another process of this run ended without a word, killed perhaps for want of memory: run it again, "
    "with fewer images in a batch if need be."
)

_Value = TypeVar("_Value")


_hosts: dist.ProcessGroup | None = None  # the default one, where that is of hosts already


class OfThisRank(nn.Module):
    """A module whose buffers are this process's share of a sum, and differ from those of the others."""

    def hold(self, shares: Sequence[Mapping[str, Tensor]]) -> None:
        """Let the own share be the sum of ``shares``, buffers by name, of processes before a resumption."""
        raise NotImplementedError


def connected() -> bool:
    """Whether this process has a process group with others."""
    return dist.is_available() and dist.is_initialized()


def place() -> tuple[int, int]:
    """Return the rank of this process and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if connected() else (0, 1)


def is_first() -> bool:
    """Whether this is the process that writes results, curves and the console; known before they connect."""
    return getattr(rank_zero_only, "rank", 0) == 0


def slice_of(count: int, rank: int, world_size: int) -> slice:
    """Return which of ``count`` items belong to a rank: the parts are in order and differ by one at most.

    >>> [slice_of(5, rank, 2) for rank in range(2)]
    [slice(0, 2, None), slice(2, 5, None)]
    """
    return slice(rank * count // world_size, (rank + 1) * count // world_size)


def total(share: Tensor) -> Tensor:
    """Return the sum of ``share`` over all processes."""
    if not connected():
        return share
    found = share.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(found)
    return found


def totals(shares: Sequence[Tensor]) -> list[Tensor]:
    """Return the sum over all processes of each of ``shares``, with one message for all."""
    if not connected() or not shares:
        return list(shares)
    flat = total(torch.cat([share.detach().flatten() for share in shares]))
    parts = flat.split([share.numel() for share in shares])
    return [part.view_as(share).to(share.dtype) for part, share in zip(parts, shares, strict=True)]


def part(mean: Tensor, count: int) -> Tensor:
    """Return the share that a mean over ``count`` items of this process has in the mean over those of all.

    The shares of all processes add up to that mean. A process without items has none, whatever its value, as
    NaN is the mean of nothing; its gradients are zero.
    """
    if not connected():
        return mean
    items = torch.tensor(count, dtype=torch.float64, device=mean.device)
    share = mean * (items / total(items)).to(mean.dtype)
    return share if count else share.nan_to_num()


def meet() -> None:
    """Let connected processes exchange plain values from host to host, for which no device has to wait."""
    global _hosts
    if _hosts is None and "gloo" not in dist.get_backend():
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        _hosts = group


def of_all(value: _Value) -> list[_Value]:
    """Return the plain ``value`` of every process, by rank; tensors in it are in main memory."""
    values = [value] * place()[1]
    if connected():
        dist.all_gather_object(values, value, group=_hosts)
    return values


def of_first(value: Callable[[], _Value]) -> _Value:
    """Return the plain value that ``value`` gives on the first process, the only one that asks for it."""
    if not connected():
        return value()
    values: list[Any] = [value() if is_first() else None]
    dist.broadcast_object_list(values, src=0, group=_hosts)
    found: _Value = values[0]
    return found


def anywhere(holds: bool) -> bool:
    """Whether something holds on any process."""
    if not connected():
        return holds
    found = torch.tensor(int(holds))
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_hosts)
    return bool(found)


def from_first(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the first process's ``tensor``, by way of ``device``, where the processes meet."""
    if not connected():
        return tensor
    sent = tensor.to(device, copy=True)
    dist.broadcast(sent, src=0)
    return sent.to(tensor.device)


def gathered(part: Tensor) -> Tensor:
    """Return the rows of all processes (N, …), by rank, of which each has a ``part`` (n, …).

    Gradients flow back: each process's part gets the sum of what all processes' results ask of it.
    """
    if not connected():
        return part
    rows: Tensor = _Gathered.apply(part)
    return rows


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        """Put the part among zeros, and add up."""
        rank, world_size = place()
        counts = total(nn.functional.one_hot(torch.tensor(rank), world_size).to(part.device) * len(part))
        before, every = int(counts[:rank].sum()), int(counts.sum())
        ctx.own = slice(before, before + len(part))
        rows = part.new_zeros(every, *part.shape[1:])
        rows[ctx.own] = part
        return total(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Add up what all processes ask, and keep the own part."""
        return total(gradient)[ctx.own]


@torch.no_grad()
def agree(module: nn.Module) -> None:
    """Give every process the parameters and buffers of the first where they differ by a single bit.

    They are made from equal sums by equal steps, so on equal devices nothing is sent. The shape of a buffer
    may differ, too: a basis can hold one direction more.
    """
    if not connected():
        return
    rank, _ = place()
    first, differing = _compared(module)
    if not differing:
        return
    state, device = module.state_dict(), next(module.parameters()).device
    for name in differing:
        value = None
        if name in first:
            shape, dtype, _ = first[name]
            value = from_first(state[name] if rank == 0 else torch.empty(shape, dtype=dtype), device)
        if rank:
            put(module, name, value)


def require_agreement(module: nn.Module) -> None:
    """Check that all processes hold the same parameters and buffers.

    Raises:
        RuntimeError: If one differs; on every process, with the name of what does.
    """
    _, differing = _compared(module)
    if differing:
        raise RuntimeError(
            f"The processes of this run no longer hold the same {', '.join(differing[:3])}: let a step "
            "depend on nothing but sums over all processes, see cl_bench/processes/ranks.py."
        )


Prints = dict[str, tuple[tuple[int, ...], torch.dtype, int]]
"""Shape, type and checksum of tensors, by name."""


def _compared(module: nn.Module) -> tuple[Prints, list[str]]:
    """Return the first process's prints of the state of ``module``, and the names of what is not equal."""
    mine = _prints(module)
    everywhere = of_all(mine)
    names = dict.fromkeys(name for prints in everywhere for name in prints)
    return everywhere[0], [name for name in names if len({prints.get(name) for prints in everywhere}) > 1]


def _prints(module: nn.Module) -> Prints:
    own = tuple(f"{name}." for name, part in module.named_modules() if isinstance(part, OfThisRank))
    state = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if isinstance(tensor, Tensor) and not name.startswith(own)
    }
    if not state:
        return {}
    sums = torch.stack([fingerprint(tensor) for tensor in state.values()]).tolist()
    return {
        name: (tuple(tensor.shape), tensor.dtype, checksum)
        for (name, tensor), checksum in zip(state.items(), sums, strict=True)
    }


def failed_first(error: str) -> str | None:
    """Tell the other processes of ``error``, and return that of another which failed before.

    None if none did, or if it failed alike, as where all see the same loss.
    """
    if not connected():
        return None
    rank, _ = place()
    try:
        store = dist.distributed_c10d._get_default_store()  # has no public name
        if _ABANDONED in error and not store.check([_FAILURE]):
            return _WITHOUT_A_WORD
        said: str = store.compare_set(_FAILURE, "", f"{rank}: {error}").decode()
    except Exception:  # the first process keeps the store
        return "The first process has ended."
    of, _, words = said.partition(": ")
    return None if int(of) == rank or words == error else f"Process {of}: {words}"


def first_hears() -> bool:
    """Whether the first process is woken from a sum when another ends, and can say why; NCCL lets it wait."""
    return connected() and "gloo" in dist.get_backend()
