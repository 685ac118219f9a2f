"""How much memory a call takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Peak:
    """What a call needs beyond what there was before it.

    Attributes:
        bytes: The most that was in use at one time, after the context of :meth:`watching` has ended.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what this thread and its backward passes allocate as long as the context is open.

        On a CPU these are the tensors; what libraries take for themselves inside a product is not seen.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            yield
            self.bytes = torch.cuda.max_memory_allocated(self._device) - before
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
            yield
        self.bytes = _highest(_allocations(profile))


def held_bytes(module: nn.Module, optimizer: Optimizer | None = None) -> int:
    """Return the bytes of a module's tensors, of their gradients and of an optimizer's state.

    Tensors that a part of the module holds as plain attributes count as well.
    """
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    tensors += [held for part in module.modules() for held in vars(part).values() if isinstance(held, Tensor)]
    tensors += [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    if optimizer is not None:
        states = optimizer.state.values()
        tensors += [value for state in states for value in state.values() if isinstance(value, Tensor)]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def _allocations(profile: torch.profiler.profile) -> Iterator[int]:
    """Yield what was allocated, and as a negative number what was freed, in the order of time."""
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            yield event.nbytes()  # type: ignore[attr-defined]


def _highest(changes: Iterable[int]) -> int:
    """Return the highest sum of the first so many ``changes``.

    >>> _highest([4, -1, 2, -5])
    5
    """
    now = highest = 0
    for change in changes:
        now += change
        highest = max(highest, now)
    return highest
