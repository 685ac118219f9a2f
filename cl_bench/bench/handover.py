"""A training of Lightning's that takes one step when it is asked to, so that several can alternate."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from cl_bench.contracts.datamodule import Batch

_Context = AbstractContextManager[object]
_ENDLESS = 10**9  # batches; without a length, Lightning fetches each before the step on the one before


class Handover:
    """Batches for one iteration, each of which waits until somebody gives it.

    From the moment a batch is given to the moment the next is asked for, whoever iterates has dealt with it.
    """

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._given: queue.SimpleQueue[tuple[Batch, _Context] | None] = queue.SimpleQueue()

    def __len__(self) -> int:
        """Return a number of batches that is never reached."""
        return _ENDLESS

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches as they are given."""
        while True:
            self._asked.put(None)
            given = self._given.get()
            if given is None:
                return
            batch, around = given
            with around:
                yield batch

    def give(self, batch: Batch | None, around: _Context) -> None:
        """Give a batch, which is dealt with inside of ``around``; None ends the iteration."""
        self._given.put(None if batch is None else (batch, around))

    def stop(self, error: BaseException | None) -> None:
        """Say that nobody iterates any more, and why."""
        self._asked.put(error or _Ended())

    def wait(self) -> None:
        """Wait until a batch is asked for.

        Raises:
            BaseException: Whatever ended the iteration.
        """
        asked = self._asked.get()
        if asked is not None:
            raise asked


class SteppedTraining:
    """A training in a thread of its own that waits before every batch.

    Args:
        train: Trains on the batches of ``handover``, and whatever belongs to that before and after.
        handover: Its batches.
    """

    def __init__(self, train: Callable[[], None], handover: Handover) -> None:
        self._train = train
        self._handover = handover
        self._threads = torch.get_num_threads()
        # Where torch keeps how it compiles; a thread begins without one.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), daemon=True)

    def start(self) -> None:
        """Train up to the first step.

        Raises:
            ValueError: If there is none.
        """
        self._thread.start()
        try:
            self._handover.wait()
        except _Ended as error:
            raise ValueError("Nothing is trained here, so there is no step to measure.") from error

    def step(self, batch: Batch, around: _Context | None = None) -> None:
        """Take one step on ``batch``, inside of ``around`` in the thread of the training."""
        self._handover.give(batch, nullcontext() if around is None else around)
        self._handover.wait()

    def finish(self) -> None:
        """Do what comes after the last step."""
        self._handover.give(None, nullcontext())
        try:
            self._handover.wait()
        except _Ended:
            self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        error: BaseException | None = None
        try:
            self._train()
        except BaseException as found:  # it belongs to whoever waits
            error = found
        self._handover.stop(error)


class _Ended(Exception):
    """The training is over."""
