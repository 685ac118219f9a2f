"""Atomic writes: a reader finds the whole file or none, and detects a damaged one."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that replaces ``path`` when the context ends without an error.

    If the process is killed, the machine stops or the disk is full, ``path`` is the old file or the new one,
    never a part. The folder is created if necessary.

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
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def is_whole(path: Path) -> bool:
    """Whether ``path`` is a zip archive, such as torch writes, each part of which matches its checksum."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, EOFError, OSError, zlib.error, NotImplementedError):
        return False


def _sync(folder: Path) -> None:
    """Write the new name to disk, so that it survives a power cut."""
    descriptor: Any = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
