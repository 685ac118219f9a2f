"""Unpacking an archive that may be malicious or truncated."""

from __future__ import annotations

import gzip
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from cl_bench.prepare.archives import Advance, human

STAGING = ".unpacking"
"""Folder below the root for incomplete files; the next preparation of the root removes it."""

_LARGEST_RATIO = 20  # unpacked bytes for each byte of the archive: pictures hardly compress
_SMALLEST_LIMIT = 1 << 20
_BLOCK = 1 << 20
_LARGEST_HEADER = 1 << 20  # of a long name or of extended attributes; a name has at most 4096 bytes
_HEADER = tarfile.BLOCKSIZE  # bytes of an ordinary header, which counts towards what an archive grows to
_LONG_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_HEADROOM = 1.02  # folders and partly filled blocks take space as well
_UNREADABLE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
)


class _Entry(tarfile.TarInfo):
    """An entry of a tar whose header must be whole: tarfile would take a damaged one for the end."""

    @classmethod
    def fromtarfile(cls, members: tarfile.TarFile) -> _Entry:
        """Return the next entry.

        Raises:
            tarfile.ReadError: If its header cannot be read, or the tar ends without its end mark.
        """
        try:
            return super().fromtarfile(members)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {members.offset:,}") from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Entry:
        """Return the entry of a header.

        Raises:
            tarfile.ReadError: If a long name or extended attributes follow that would fill the memory.
        """
        entry = super().frombuf(buf, encoding, errors)
        if entry.type in _LONG_HEADERS and entry.size > _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {human(entry.size)}")
        return entry


def unpack(archive: Path, folder: str, root: Path, advance: Advance = lambda _: None) -> None:
    """Unpack ``folder`` from ``archive``, a tar or a zip, to ``root/folder``.

    The folder appears when it is complete.

    Args:
        archive: The file; its checksum, if one is published, has been verified.
        folder: The one folder to keep.
        root: Folder to unpack into.
        advance: Called with the number of bytes unpacked since the last call.

    Raises:
        ValueError: If the archive has an entry whose name or kind could write elsewhere, would grow beyond
            reason, is truncated, or lacks the folder; nothing unpacked is left then.
        OSError: If the disk has too little space.
    """
    with staging(root) as stage, _readable(archive):
        if archive.suffix == ".zip":
            _unpack_zip(archive, stage, advance)
        else:
            with archive.open("rb") as stream:
                unpack_tar(stream, archive, stage, advance)
        if not (stage / folder).is_dir():
            raise ValueError(f"{archive} has no folder {folder}: it is another archive, remove it.")
        (stage / folder).rename(root / folder)


@contextmanager
def staging(root: Path) -> Iterator[Path]:
    """Yield an empty folder below ``root``, which is removed afterwards in any case."""
    stage = root / STAGING
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage)


def unpack_tar(stream: IO[bytes], archive: Path, into: Path, advance: Advance = lambda _: None) -> None:
    """Unpack a tar, compressed or not, from ``stream``.

    Args:
        stream: Its bytes, from the beginning; it is read twice.
        archive: Its path, for errors.
        into: An existing folder.
        advance: Called with the number of bytes unpacked since the last call.

    Raises:
        ValueError: As in :func:`unpack`.
        OSError: If the disk has too little space.
    """
    with _readable(archive):
        begin = stream.tell()
        length = stream.seek(0, 2) - begin
        stream.seek(begin)
        with tarfile.open(fileobj=stream, mode="r:*", tarinfo=_Entry) as members:
            _require_room(archive, _safe_sizes(archive, members), length, into)
            _require_end(archive, members, length)
        stream.seek(begin)
        with tarfile.open(fileobj=stream, mode="r:*", tarinfo=_Entry) as members:
            for member in members:
                members.extract(member, into, filter="data")
                advance(member.size)


def _safe_sizes(archive: Path, members: Iterable[tarfile.TarInfo]) -> Iterator[int]:
    for member in members:
        _require_inside(archive, member.name)
        if not (member.isfile() or member.isdir()):
            kind = "a link" if member.issym() or member.islnk() else "neither a file nor a folder"
            raise ValueError(f"{archive} holds {member.name!r}, {kind}: remove the archive.")
        yield member.size


def _unpack_zip(archive: Path, into: Path, advance: Advance) -> None:
    with zipfile.ZipFile(archive) as members:
        infos = members.infolist()
        for info in infos:
            _require_inside(archive, info.filename)
            if stat.S_ISLNK(info.external_attr >> 16):
                raise ValueError(f"{archive} holds {info.filename!r}, a link: remove the archive.")
        sizes = (info.file_size for info in infos)
        _require_room(archive, sizes, archive.stat().st_size, into)
        for info in infos:
            members.extract(info, into)
            advance(info.file_size)


def _require_inside(archive: Path, name: str) -> None:
    """Refuse a name outside the folder into which the archive is unpacked."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in name.split("/")[0]:
        raise ValueError(
            f"{archive} holds the name {name!r}, which lies outside its folder: remove the archive."
        )


def _require_end(archive: Path, members: tarfile.TarFile, packed: int) -> None:
    """Read on after the last entry, because a compressed archive has its checksum there."""
    stream = members.fileobj
    assert stream is not None
    _reasonable(archive, map(len, iter(lambda: stream.read(_BLOCK), b"")), packed)


def _require_room(archive: Path, sizes: Iterable[int], packed: int, into: Path) -> None:
    """Refuse entries that grow beyond reason or beyond the disk."""
    require_space(into, _reasonable(archive, sizes, packed), f"to unpack {archive.name}")


def _reasonable(archive: Path, sizes: Iterable[int], packed: int) -> int:
    """Return the sum of ``sizes``, unless it and a header each grow too large for ``packed`` bytes."""
    limit = max(_LARGEST_RATIO * packed, _SMALLEST_LIMIT)
    total = 0
    for number, size in enumerate(sizes, start=1):
        total += size
        if total + number * _HEADER > limit:
            raise ValueError(
                f"{archive} would grow from {human(packed)} to more than {human(limit)}, which no archive of "
                "pictures does: remove it."
            )
    return total


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Check that the disk has enough space.

    Raises:
        OSError: If ``needed`` bytes are not free where ``folder`` lies.
    """
    free = shutil.disk_usage(folder).free
    if needed * _HEADROOM > free:
        raise OSError(
            f"The disk of {folder} has {human(free)} free and {human(needed)} are needed {purpose}: "
            "free some space, or choose another --root."
        )


@contextmanager
def _readable(archive: Path) -> Iterator[None]:
    """Turn every error of a damaged archive into one sentence."""
    try:
        yield
    except (*_UNREADABLE, OSError) as error:
        if not isinstance(error, _UNREADABLE) and str(error) != "Invalid data stream":  # what bz2 raises
            raise
        reason = str(error).partition("\n")[0].rstrip(":")
        raise ValueError(f"{archive} is damaged or truncated ({reason}): remove it and run again.") from error
