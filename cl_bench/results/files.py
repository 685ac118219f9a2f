"""Atomic writes: a reader finds the whole file or none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replaced(path: Path, require: Callable[[], None] = lambda: None) -> Iterator[IO[bytes]]:
    """Open a file for writing that replaces ``path`` when the context ends without an error.

    If the process is killed, the machine stops or the disk is full, ``path`` is the old file or the new one,
    never a part. The folder is created if necessary.

    Args:
        path: The file.
        require: Called last before the new file takes its name; what it raises keeps the old one.

    Raises:
        OSError: If the file cannot be written; the old file is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        require()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Write the new name to disk, so that it survives a power cut."""
    descriptor: Any = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
