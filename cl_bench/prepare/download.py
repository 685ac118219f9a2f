"""Fetching a published file, going on where an earlier attempt ended, whatever the server does meanwhile."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from cl_bench.prepare.archives import Advance, Archive, human, require_whole

_WORTH_ANOTHER_TRY = {408, 425, 429, 500, 502, 503, 504}
_RANGE_NOT_SATISFIABLE = 416


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for.

    Attributes:
        seconds: Without a byte, or without a connection, before an attempt is given up.
        attempts: In a row that bring no new byte, before the download is.
        pause: Seconds before the second attempt in a row; doubled for each one after it.
    """

    seconds: float = 30.0
    attempts: int = 5
    pause: float = 1.0


PATIENCE = Patience()
"""With a server of the real world."""


def partial(archive: Archive, root: Path) -> Path:
    """Return where an unfinished download of ``archive`` is kept."""
    return root / f"{archive.name}.part"


def download(
    archive: Archive, root: Path, patience: Patience = PATIENCE, advance: Advance = lambda _: None
) -> None:
    """Fetch ``archive`` into ``root``; the file has its name only once its checksum holds.

    A part that an earlier call left is completed. Where the whole then has another checksum, it is fetched
    once more from its beginning: the part may have been of another file.

    Args:
        archive: What to fetch.
        root: Folder that holds the file.
        patience: How long the server is waited for.
        advance: Told of the bytes that were written; of a negative number when they turn out to be useless.

    Raises:
        ConnectionError: If the server cannot be reached, or stops sending for good.
        ValueError: If it sends another file than the published one.
    """
    part = partial(archive, root)
    resumed = part.exists()
    _complete(archive, part, patience, advance)
    try:
        require_whole(part, archive)
    except ValueError as error:
        advance(-_size(part))
        part.unlink()
        if not resumed:
            raise ValueError(_another_file(archive, error)) from error
        download(archive, root, patience, advance)
        return
    part.replace(root / archive.name)


def _another_file(archive: Archive, error: ValueError) -> str:
    found = re.search(r"has (the \w+ \w+|[\d,]+ bytes)", str(error))
    it_has = found[1] if found else "changed"
    return f"{archive.url} gives another file than the published one, with {it_has}: {_elsewhere(archive)}"


def _complete(archive: Archive, part: Path, patience: Patience, advance: Advance) -> None:
    """Append to ``part`` until it has the published size."""
    assert archive.size is not None
    if _size(part) > archive.size:
        part.unlink()
    farthest, in_vain, problem = _size(part), 0, ""
    with httpx.Client(timeout=patience.seconds, follow_redirects=True) as client:
        while _size(part) < archive.size:
            try:
                _receive(client, archive, part, advance)
                problem = "the connection ended early"
            except httpx.HTTPError as error:
                problem = str(error) or type(error).__name__
            in_vain = 0 if _size(part) > farthest else in_vain + 1
            farthest = max(farthest, _size(part))
            if in_vain == patience.attempts:
                raise ConnectionError(_gave_up(archive, part, patience, problem))
            if in_vain:
                time.sleep(patience.pause * 2 ** (in_vain - 1))


def _receive(client: httpx.Client, archive: Archive, part: Path, advance: Advance) -> None:
    """Append what one answer brings.

    Raises:
        httpx.HTTPError: If another attempt may do better.
        ConnectionError: If none will.
        ValueError: If the file at the address is longer or shorter than the published one.
    """
    have, size = _size(part), archive.size
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with client.stream("GET", archive.url, headers=headers) as answer:
        if answer.status_code == _RANGE_NOT_SATISFIABLE:
            advance(-have)
            part.unlink()
            raise ValueError(
                f"{archive.url} has fewer than the published {size:,} bytes: {_elsewhere(archive)}"
            )
        if answer.is_error and answer.status_code not in _WORTH_ANOTHER_TRY:
            raise ConnectionError(
                f"{archive.url} answers {answer.status_code} {answer.reason_phrase}: {_elsewhere(archive)}"
            )
        answer.raise_for_status()
        start = _start(answer)
        if start not in (0, have):
            raise httpx.RemoteProtocolError(f"bytes from {start} were sent in place of those from {have}")
        if start < have:  # ranges are not kept to: this answer begins at the beginning
            advance(-have)
        with part.open("r+b" if start else "wb") as stream:
            stream.seek(start)
            for block in answer.iter_raw():
                stream.write(block)
                advance(len(block))
                assert size is not None
                if stream.tell() > size:
                    break
    if size is not None and _size(part) > size:
        part.unlink()
        raise ValueError(f"{archive.url} sends more than the published {size:,} bytes: {_elsewhere(archive)}")


def _start(answer: httpx.Response) -> int:
    """Return the place in the file at which the answer begins."""
    if answer.status_code != httpx.codes.PARTIAL_CONTENT:
        return 0
    match = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    if match is None:
        raise httpx.RemoteProtocolError("a part was sent that does not say which")
    return int(match[1])


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _elsewhere(archive: Archive) -> str:
    return f"fetch {archive.name} from elsewhere and put it beside the others."


def _gave_up(archive: Archive, part: Path, patience: Patience, problem: str) -> str:
    assert archive.size is not None
    return (
        f"{archive.url} sent nothing new in {patience.attempts} attempts ({problem}): "
        f"{human(_size(part))} of {human(archive.size)} are kept, the same command goes on from there."
    )
