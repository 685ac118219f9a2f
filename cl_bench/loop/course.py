"""Where a run stands in its stream, and what may end it early: a signal, a loss of NaN or ∞, memory."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Literal

import torch

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.data.experience import Experience
from cl_bench.errors import is_of_memory, is_of_shared_memory

Phase = Literal["expanded", "training", "merging", "testing"]
"""What comes next: the pass before training, the steps, the pass after them, or the evaluation."""


class Course:
    """The state of a run between two of its steps, an argument of trainer, callbacks and continuation.

    Args:
        device: The device that trains; clocks wait for it.

    Attributes:
        experience: The experience at hand, once one has begun.
        phase: What comes next in it.
        epoch: Epochs of it that are done, if a training step comes next.
        batches: Batches of the next epoch that are done, if a training step comes next.
        stepping: Whether its training steps have begun and not ended.
        seconds: Its seconds so far, by what they were spent on.
        trainable: Number of parameters with a gradient.
        interruption: Signals that ask the run to end.
    """

    experience: Experience

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.interruption = Interruption()
        self._reset()

    def begin(self, experience: Experience) -> None:
        """Start with ``experience``; nothing of it is done yet."""
        self.experience = experience
        self._reset()

    def _reset(self) -> None:
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
        """Add the seconds spent inside the context to those of ``name``."""
        start = self.now()
        try:
            yield
        finally:
            self.add(name, self.now() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add ``seconds`` to those of ``name``."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def now(self) -> float:
        """Return the seconds on a clock, after the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Interruption:
    """While open, Ctrl-C and SIGTERM raise :class:`Interrupted`: at once, or in :meth:`raise_if_requested`.

    Outside the main thread, signals keep their handlers.

    Attributes:
        deferred: Whether a signal waits for :meth:`raise_if_requested`; a second signal never waits.
        requested: Whether a signal is waiting.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the earlier handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def raise_if_requested(self) -> None:
        """Raise if a signal is waiting.

        Raises:
            Interrupted: If so.
        """
        if self.requested:
            raise Interrupted

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.deferred and not self.requested:
            self.requested = True
            return
        raise Interrupted


class Interrupted(BaseException):
    """The run was asked to end.

    Lightning ends the process at a KeyboardInterrupt; it passes this exception on.
    """


class Diverged(RuntimeError):
    """A number that has to be finite is not."""

    @classmethod
    def at(cls, what: str) -> Diverged:
        """Return an error about ``what`` is not finite and where, with a remedy."""
        remedy = "lower the learning rate, or clip gradients with --trainer.gradient_clip_val."
        return cls(f"{what}: {remedy}")


class OutOfMemory(RuntimeError):
    """A batch does not fit into memory."""


@contextmanager
def naming_batch_size(course: Course, datamodule: StreamDataModule) -> Iterator[None]:
    """Name the batch size in an out-of-memory error, and the workers if they share too little memory."""
    try:
        yield
    except Exception as error:
        if is_of_shared_memory(error):
            raise OutOfMemory(
                "The batches that workers load do not fit into the memory that processes share, /dev/shm: "
                "choose fewer --num_workers, a smaller --batch_size and --test_batch_size, or enlarge it "
                "(docker run --shm-size)."
            ) from error
        if not is_of_memory(error):
            raise
        name = "batch_size" if course.stepping else "test_batch_size"
        raise OutOfMemory(
            f"A batch of {getattr(datamodule, name)} images does not fit into the memory of "
            f"{course.device}: lower --data.{name}."
        ) from error
