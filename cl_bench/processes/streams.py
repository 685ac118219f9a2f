"""The output of a process, whose failure never affects its work: what cannot be shown is dropped."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class _Null(io.TextIOBase):
    """A stream that drops everything."""

    def write(self, text: str) -> int:
        return len(text)


class Unfailing:
    """A text stream without errors: after the first one, its descriptor is the null device.

    Readers such as ``head`` close a pipe early, disks fill up, and terminals close or lack a character.

    Args:
        stream: The stream; None, as Python gives a closed one, means the null device.

    Attributes:
        error: The first error of the stream, if there was one.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream: TextIO | _Null = _Null() if stream is None else stream
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        """Write ``text``, with escapes for characters that the encoding lacks, and return its length."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            known = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
            return self.write(known)
        except (OSError, ValueError) as error:  # the latter for a stream that was closed
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Write what is still in memory."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def __getattr__(self, name: str) -> Any:
        """Return what the stream itself has under ``name``."""
        return getattr(self._stream, name)

    def _drop(self, error: Exception) -> None:
        """Send all further output to the null device, also that of libraries and at exit."""
        self.error = self.error or error
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError):  # it is closed, or in memory
            self._stream = _Null()
            return
        with open(os.devnull, "w", encoding="utf-8") as null:
            os.dup2(null.fileno(), descriptor)


@contextmanager
def unfailing_output() -> Iterator[tuple[Unfailing, Unfailing]]:
    """Let standard output and standard error be :class:`Unfailing`, and yield both.

    A standard descriptor that is closed becomes the null device; the next opened file would take its place.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free one
    before = sys.stdout, sys.stderr
    streams = Unfailing(sys.stdout), Unfailing(sys.stderr)
    sys.stdout, sys.stderr = streams
    try:
        yield streams
    finally:
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = before
