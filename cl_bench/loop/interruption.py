"""Ctrl-C and SIGTERM, heard between two steps of training."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(BaseException):
    """Somebody asked the run to end.

    Lightning answers a KeyboardInterrupt by ending the process; this one it hands on.
    """


class Interruption:
    """While open, Ctrl-C and SIGTERM raise :class:`Interrupted`: at once, or where :meth:`heed` is called.

    Outside of the main thread, signals do what they did before.

    Attributes:
        deferred: Whether a signal waits for :meth:`heed`; a second one never does.
        requested: Whether one is waiting.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        """Listen."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put back what signals did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def heed(self) -> None:
        """Raise if a signal is waiting.

        Raises:
            Interrupted: If so.
        """
        if self.requested:
            raise Interrupted

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.deferred and not self.requested:
            self.requested = True
            return
        raise Interrupted
