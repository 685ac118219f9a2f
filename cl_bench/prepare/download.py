"""Fetching a published file from an unreliable server, resuming where an earlier attempt ended."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from cl_bench.prepare.archives import Advance, Archive, human, require_whole

_WORTH_RETRYING = {408, 425, 429, 500, 502, 503, 504}
_RANGE_NOT_SATISFIABLE = 416


@dataclass(frozen=True)
class Patience:
    """Timeouts and retries.

    Attributes:
        seconds: Time without ``least`` bytes, or without a response, after which an attempt fails.
        attempts: Attempts in a row with fewer than ``least`` new bytes after which the download fails.
        pause: Seconds before the second attempt in a row; doubled for each further one.
        least: Bytes that a server must send in ``seconds``; fewer are no progress.
    """

    seconds: float = 30.0
    attempts: int = 5
    pause: float = 1.0
    least: int = 30_000


PATIENCE = Patience()
"""For servers on the internet."""


def partial(archive: Archive, root: Path) -> Path:
    """Return the path of an unfinished download of ``archive``."""
    return root / f"{archive.name}.part"


def received(archive: Archive, root: Path) -> int:
    """Return the number of bytes of an unfinished download of ``archive``."""
    return _size(partial(archive, root))


def download(
    archive: Archive, root: Path, patience: Patience = PATIENCE, advance: Advance = lambda _: None
) -> None:
    """Fetch ``archive`` into ``root``; the file gets its name when its checksum is verified.

    An unfinished download of an earlier call is completed. If its checksum is wrong, the file is fetched once
    more from the beginning, because the unfinished part may have been of another file.

    Args:
        archive: What to fetch.
        root: Folder of the file.
        patience: Timeouts and retries.
        advance: Called with the number of bytes written since the last call; negative if bytes are discarded.

    Raises:
        ConnectionError: If the server cannot be reached, or stops sending.
        ValueError: If the server sends another file than the published one.
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
    return f"{archive.url} sends another file than the published one, with {it_has}: {_elsewhere(archive)}"


def _complete(archive: Archive, part: Path, patience: Patience, advance: Advance) -> None:
    """Append to ``part`` until it has the published size."""
    assert archive.size is not None
    if _size(part) > archive.size:
        part.unlink()
    farthest, failures, problem = _size(part), 0, ""
    while _size(part) < archive.size:
        try:
            with httpx.Client(timeout=patience.seconds, follow_redirects=True) as client:
                _receive(client, archive, part, patience, advance)
            problem = "the connection ended early"
        except httpx.HTTPError as error:
            problem = str(error) or type(error).__name__
        failures = 0 if _size(part) - farthest >= patience.least else failures + 1
        farthest = max(farthest, _size(part))
        if failures == patience.attempts and farthest < archive.size:
            raise ConnectionError(_stalled(archive, part, patience, problem))
        if failures:
            time.sleep(patience.pause * 2 ** (failures - 1))


@contextmanager
def _response(
    client: httpx.Client, url: str, headers: dict[str, str], seconds: float
) -> Iterator[httpx.Response]:
    """Yield the response to a request, whose headers must arrive in ``seconds``.

    The timeout of the client is for each read, and a server may send its headers byte by byte.

    Raises:
        httpx.ReadTimeout: If they take longer.
    """
    late = threading.Event()

    def give_up() -> None:
        late.set()
        client.close()  # the next byte that arrives ends the read

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        response = client.send(client.build_request("GET", url, headers=headers), stream=True)
    except Exception as error:  # a closed socket raises different errors with and without encryption
        if late.is_set():
            raise httpx.ReadTimeout(f"no complete response in {seconds:g} seconds") from error
        raise
    finally:
        timer.cancel()
    try:
        yield response
    finally:
        response.close()


def _blocks(response: httpx.Response, patience: Patience) -> Iterator[bytes]:
    """Yield the bytes of a response.

    Raises:
        httpx.ReadTimeout: If fewer than ``least`` bytes arrive in ``seconds``.
    """
    began, since = time.monotonic(), 0
    for block in response.iter_raw():
        yield block
        since += len(block)
        if time.monotonic() - began > patience.seconds:
            if since < patience.least:
                raise httpx.ReadTimeout(f"only {since:,} bytes in {patience.seconds:g} seconds")
            began, since = time.monotonic(), 0


def _receive(
    client: httpx.Client, archive: Archive, part: Path, patience: Patience, advance: Advance
) -> None:
    """Append the bytes of one response.

    Raises:
        httpx.HTTPError: If another attempt may succeed.
        ConnectionError: If no other attempt will.
        ValueError: If the file at the address is longer or shorter than the published one.
    """
    have, size = _size(part), archive.size
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with _response(client, archive.url, headers, patience.seconds) as response:
        if response.status_code == _RANGE_NOT_SATISFIABLE:
            advance(-have)
            part.unlink()
            raise ValueError(
                f"{archive.url} has fewer than the published {size:,} bytes: {_elsewhere(archive)}"
            )
        if response.is_error and response.status_code not in _WORTH_RETRYING:
            status = f"{response.status_code} {response.reason_phrase}"
            raise ConnectionError(f"{archive.url} returned {status}: {_elsewhere(archive)}")
        response.raise_for_status()
        start = _start(response)
        if start not in (0, have):
            raise httpx.RemoteProtocolError(f"the server sent bytes from {start}, not from {have}")
        if start < have:  # the server ignores ranges: this response starts from the beginning
            advance(-have)
        with part.open("r+b" if start else "wb") as stream:
            stream.seek(start)
            for block in _blocks(response, patience):
                stream.write(block)
                advance(len(block))
                assert size is not None
                if stream.tell() > size:
                    break
    if size is not None and _size(part) > size:
        part.unlink()
        raise ValueError(f"{archive.url} sends more than the published {size:,} bytes: {_elsewhere(archive)}")


def _start(response: httpx.Response) -> int:
    """Return the offset in the file at which the response begins."""
    if response.status_code != httpx.codes.PARTIAL_CONTENT:
        return 0
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if match is None:
        raise httpx.RemoteProtocolError("the server sent a part without its range")
    return int(match[1])


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _elsewhere(archive: Archive) -> str:
    return f"fetch {archive.name} from elsewhere and put it into the root."


def _stalled(archive: Archive, part: Path, patience: Patience, problem: str) -> str:
    assert archive.size is not None
    return (
        f"{archive.url} sent fewer than {human(patience.least)} in each of {patience.attempts} attempts "
        f"({problem}), and {human(_size(part))} of {human(archive.size)} are kept: "
        "run the same command to resume."
    )
