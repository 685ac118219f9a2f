"""Atomic writes, so that a reader finds the whole file or none, and file names that are safe everywhere."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_LONGEST = 100  # bytes: with a prefix and an ending, the name fits into every file system
# Names of devices on Windows, whatever their ending.
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


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


def file_name(text: str) -> str:
    """Return ``text`` as a name of a file, never a path: letters, digits, dots, hyphens and underscores.

    A text that is such a name already is returned as it is. From any other text, what does not fit is
    replaced, and part of its hash is added, so that two texts seldom have one name.

    >>> file_name("digits-T5"), file_name("../../.bashrc")
    ('digits-T5', '_.._.bashrc-1559504c')
    """
    name = re.sub(r"[^\w.-]", "_", unicodedata.normalize("NFC", text)).lstrip(".-")
    name = name.encode()[:_LONGEST].decode(errors="ignore").rstrip(".")
    if name == text and name and not _RESERVED.match(name):
        return name
    prefix = "_" if not name or _RESERVED.match(name) else ""
    return f"{prefix}{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def file_names(texts: Iterable[str]) -> dict[str, str]:
    """Return a file name for each of ``texts``, unequal to the others even where upper case is lower case.

    >>> file_names(["toy-T3", "Toy-T3"])
    {'toy-T3': 'toy-T3', 'Toy-T3': 'Toy-T3-2'}
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for text in dict.fromkeys(texts):
        name, number = file_name(text), 1
        while _folded(name) in taken:
            number += 1
            name = f"{file_name(text)}-{number}"
        taken.add(_folded(name))
        names[text] = name
    return names


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())
