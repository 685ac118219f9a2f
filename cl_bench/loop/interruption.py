"""Ctrl-C and SIGTERM, handled between two training steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(BaseException):
    """The run was asked to end.

    Lightning ends the process at a KeyboardInterrupt; it passes this exception on.
    """


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
