"""What the processes of one run share: sums over all of them, and state that is bit-identical on each.

A run has one process for each device. All processes hold the same model, and process r, its *rank*, takes the
r-th part of every batch. Without a process group, every function returns what a single process has, at no
cost.
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
_ABANDONED = "by peer"  # gloo's words for a process that is gone
_KILLED = (
    "Another process of this run ended without an error message, perhaps killed because memory was full: run "
    "it again, if necessary with a smaller --data.batch_size."
)

_Value = TypeVar("_Value")

_hosts: dist.ProcessGroup | None = None  # None for the default group, if that connects hosts already


class OfThisRank(nn.Module):
    """A module whose buffers are this process's share of a sum, and differ between processes."""

    def hold(self, shares: Sequence[Mapping[str, Tensor]]) -> None:
        """Hold the sum of ``shares``, buffers by name, of the processes of an earlier attempt."""
        raise NotImplementedError


def connected() -> bool:
    """Whether this process has a process group with others."""
    return dist.is_available() and dist.is_initialized()


def place() -> tuple[int, int]:
    """Return the rank of this process and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if connected() else (0, 1)


def is_first() -> bool:
    """Whether this process writes results, curves and the console; known before processes connect."""
    return getattr(rank_zero_only, "rank", 0) == 0


def be_first() -> None:
    """Let this process be the first of its run, also if variables of a scheduler or a shell give it a rank.

    An interactive session of SLURM, for example, sets them for every command that is typed in it.
    """
    rank_zero_only.rank = 0  # type: ignore[attr-defined]


def slice_of(count: int, rank: int, world_size: int) -> slice:
    """Return which of ``count`` items belong to a rank; parts are in order, and sizes differ by at most one.

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
    """Return the sum over all processes of each of ``shares``, with a single message."""
    if not connected() or not shares:
        return list(shares)
    flat = total(torch.cat([share.detach().flatten() for share in shares]))
    parts = flat.split([share.numel() for share in shares])
    return [part.view_as(share).to(share.dtype) for part, share in zip(parts, shares, strict=True)]


def part(mean: Tensor, count: int) -> Tensor:
    """Return the contribution of a mean over ``count`` items of this process to the mean over all items.

    The contributions of all processes add up to that mean. A process without items contributes 0, although
    its mean is NaN, and its gradients are zero.
    """
    if not connected():
        return mean
    items = torch.tensor(count, dtype=torch.float64, device=mean.device)
    share = mean * (items / total(items)).to(mean.dtype)
    return share if count else share.nan_to_num()


def meet() -> None:
    """Connect the hosts of the processes, so that they exchange plain values without a wait for devices."""
    global _hosts
    if _hosts is None and "gloo" not in dist.get_backend():
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        _hosts = group


def of_all(value: _Value) -> list[_Value]:
    """Return the plain ``value`` of every process, by rank; its tensors are in main memory."""
    values = [value] * place()[1]
    if connected():
        dist.all_gather_object(values, value, group=_hosts)
    return values


def of_first(value: Callable[[], _Value]) -> _Value:
    """Return the plain value that ``value`` returns on the first process; no other process calls it."""
    if not connected():
        return value()
    values: list[Any] = [value() if is_first() else None]
    dist.broadcast_object_list(values, src=0, group=_hosts)
    found: _Value = values[0]
    return found


def anywhere(holds: bool) -> bool:
    """Whether ``holds`` is true on any process."""
    if not connected():
        return holds
    found = torch.tensor(int(holds))
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_hosts)
    return bool(found)


def from_first(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the first process's ``tensor``, sent by way of ``device``, which the group can reach."""
    if not connected():
        return tensor
    sent = tensor.to(device, copy=True)
    dist.broadcast(sent, src=0)
    return sent.to(tensor.device)


def gathered(part: Tensor) -> Tensor:
    """Return the rows of all processes (N, …), by rank; this process holds the ``part`` (n, …).

    Gradients flow back: each part receives the sum of its gradients over all processes.
    """
    if not connected():
        return part
    rows: Tensor = _Gathered.apply(part)
    return rows


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        """Place the part among zeros, and sum."""
        rank, world_size = place()
        counts = total(nn.functional.one_hot(torch.tensor(rank), world_size).to(part.device) * len(part))
        before, every = int(counts[:rank].sum()), int(counts.sum())
        ctx.own = slice(before, before + len(part))
        rows = part.new_zeros(every, *part.shape[1:])
        rows[ctx.own] = part
        return total(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Sum the gradients of all processes, and keep those of the own part."""
        return total(gradient)[ctx.own]


@torch.no_grad()
def agree(module: nn.Module) -> None:
    """Give every process the parameters and buffers of the first process that differ in a single bit.

    All processes compute them from equal sums by equal steps, so on equal devices nothing is sent. Buffers
    may also differ in shape, since a basis may hold one direction more, or exist on some processes only.
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
        RuntimeError: If one differs; on every process, with its name.
    """
    _, differing = _compared(module)
    if differing:
        raise RuntimeError(
            f"The processes of this run no longer hold the same {', '.join(differing[:3])}: let a step "
            "depend only on sums over all processes, see cl_bench/processes/ranks.py."
        )


Prints = dict[str, tuple[tuple[int, ...], torch.dtype, int]]
"""Shape, type and checksum of tensors, by name."""


def _compared(module: nn.Module) -> tuple[Prints, list[str]]:
    """Return the first process's prints of the state of ``module``, and the names that differ."""
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
    """Publish ``error`` to the other processes, and return the error of a process that failed earlier.

    None if no process did, or if it failed with the same error, as when all see the same loss.
    """
    if not connected():
        return None
    rank, _ = place()
    try:
        store = dist.distributed_c10d._get_default_store()  # has no public name
        if _ABANDONED in error and not store.check([_FAILURE]):
            return _KILLED
        published: str = store.compare_set(_FAILURE, "", f"{rank}: {error}").decode()
    except Exception:  # the first process holds the store
        return "The first process has ended."
    other, _, earlier = published.partition(": ")
    return None if int(other) == rank or earlier == error else f"Process {other}: {earlier}"


def first_is_woken() -> bool:
    """Whether the end of another process wakes the first from a sum, to report why; NCCL lets it wait."""
    return connected() and "gloo" in dist.get_backend()
