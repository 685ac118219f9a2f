"""Where a run stands in its stream: what trainer, lifecycle and continuation share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cl_bench.data.experience import Experience
from cl_bench.loop.checkpoint import Phase
from cl_bench.loop.interruption import Interruption


class Course:
    """The state of a run between two of its steps. It belongs to nobody; whoever needs it is given it.

    Args:
        device: The device that trains; clocks wait for it.

    Attributes:
        experience: The experience at hand.
        phase: What comes next in it.
        epoch: Epochs of it that are done, if a training step comes next.
        batches: Batches of the next epoch that are done, likewise.
        stepping: Whether its training steps have begun and not ended.
        seconds: Its seconds so far, by name of the phase.
        trainable: Number of parameters with a gradient.
        interruption: Signals that ask the run to end.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.interruption = Interruption()
        self.begin(None)

    def begin(self, experience: Experience | None) -> None:
        """Start with ``experience``; nothing of it is done yet."""
        self.experience = experience
        self.phase: Phase = "expanded"
        self.epoch = self.batches = 0
        self.stepping = False
        self.seconds: dict[str, float] = {}
        self.trainable = 0

    def step(self, stepping: bool) -> None:
        """Note that training steps begin or end; between the two, a signal waits for the end of a step."""
        self.stepping = self.interruption.deferred = stepping

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside the context to phase ``name`` of this experience."""
        start = self.now()
        try:
            yield
        finally:
            self.add(name, self.now() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add ``seconds`` to phase ``name`` of this experience."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def now(self) -> float:
        """Return the seconds on a clock, after the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
