from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cl_bench.prepare.download import Patience, download, partial

if TYPE_CHECKING:
    from tests.prepare.conftest import Fault, Publish, Server

CONTENT = np.random.RandomState(0).bytes(300_000)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_fetched_completely(
    tmp_path: Path, publish: Publish, server: Server, patience: Patience
) -> None:
    done: list[int] = []
    download(publish("a.zip", CONTENT), tmp_path, patience, done.append)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT
    assert files(tmp_path) == ["a.zip"]
    assert sum(done) == len(CONTENT)
    assert server.ranges == [None]


@pytest.mark.parametrize(
    "faults",
    [
        [("cut", 100_000), ("cut", 100_000)],
        [("cut", 0), ("cut", 0), ("cut", 1)],
        [("stall", 70_000)],
        [("announce", -200_000)],
        [("announce", 5_000)],
        [("cut", 100_000), "no ranges"],
        [("cut", 100_000), "wrong range"],
        [("status", 503), ("status", 429)],
        [("cut", 100_000), ("status", 500), ("stall", 10), ("cut", 100_000)],
    ],
    ids=str,
)
def test_a_file_is_fetched_despite_faults_of_the_server(
    faults: list[Fault], tmp_path: Path, publish: Publish, server: Server, patience: Patience
) -> None:
    done: list[int] = []
    server.faults = list(faults)
    download(publish("a.zip", CONTENT), tmp_path, patience, done.append)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT
    assert files(tmp_path) == ["a.zip"]
    assert sum(done) == len(CONTENT)
    assert not server.faults


def test_a_download_is_resumed(tmp_path: Path, publish: Publish, server: Server, patience: Patience) -> None:
    archive = publish("a.zip", CONTENT)
    partial(archive, tmp_path).write_bytes(CONTENT[:123_456])
    download(archive, tmp_path, patience)
    assert server.ranges == ["bytes=123456-"]
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


@pytest.mark.parametrize("part", [b"x" * 1000, b"x" * 300_000, b"x" * 300_001])
def test_a_part_of_another_file_is_discarded(
    part: bytes, tmp_path: Path, publish: Publish, server: Server, patience: Patience
) -> None:
    archive = publish("a.zip", CONTENT)
    partial(archive, tmp_path).write_bytes(part)
    done: list[int] = []
    download(archive, tmp_path, patience, done.append)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT
    assert server.ranges[-1] is None


def test_another_file_at_the_address_is_refused_and_leaves_nothing(
    tmp_path: Path, publish: Publish, server: Server, patience: Patience
) -> None:
    archive = publish("a.zip", CONTENT)
    server.files["a.zip"] = CONTENT[::-1]
    with pytest.raises(
        ValueError, match=r"sends another file than the published one, with the md5 \w+: fetch"
    ):
        download(archive, tmp_path, patience)
    assert files(tmp_path) == []


def test_a_longer_file_is_refused(
    tmp_path: Path, publish: Publish, server: Server, patience: Patience
) -> None:
    server.faults = [("more", 1_000_000)]
    with pytest.raises(
        ValueError, match=r"sends more than the published 300,000 bytes: fetch a.zip from elsewhere"
    ):
        download(publish("a.zip", CONTENT), tmp_path, patience)
    assert files(tmp_path) == []


def test_a_shorter_file_is_refused(
    tmp_path: Path, publish: Publish, server: Server, patience: Patience
) -> None:
    archive = publish("a.zip", CONTENT)
    server.files["a.zip"] = CONTENT[:1000]
    with pytest.raises(ValueError, match="has fewer than the published 300,000 bytes"):
        download(archive, tmp_path, patience)
    assert files(tmp_path) == []


def test_a_stalled_download_fails_and_keeps_what_was_received(
    tmp_path: Path, publish: Publish, server: Server, patience: Patience
) -> None:
    archive = publish("a.zip", CONTENT)
    server.faults = [("cut", 100_000), ("cut", 0), ("cut", 0), ("cut", 0)]
    with pytest.raises(
        ConnectionError, match=r"fewer than 1 bytes in each of 3 attempts .* 100.0 kB of 300.0 kB are kept"
    ):
        download(archive, tmp_path, patience)
    assert files(tmp_path) == ["a.zip.part"]
    download(archive, tmp_path, patience)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("fault", "problem"),
    (("drip", r"only \d+ bytes in 0\.3 seconds"), ("drip headers", r"no complete response in 0\.3 seconds")),
)
def test_a_server_that_sends_byte_by_byte_is_given_up_in_bounded_time(
    fault: str, problem: str, tmp_path: Path, publish: Publish, server: Server, patience: Patience
) -> None:
    archive = publish("a.zip", CONTENT)
    server.faults = [(fault, 20)] * 3
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=rf"sent fewer than 1.0 kB in each of 3 attempts \({problem}\)"):
        download(archive, tmp_path, replace(patience, least=1000))
    assert time.monotonic() - began < 10  # where the whole file would take 6,000 seconds
    download(archive, tmp_path, patience)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_the_last_bytes_of_a_file_may_be_few(
    tmp_path: Path, publish: Publish, server: Server, patience: Patience
) -> None:
    archive = publish("a.zip", CONTENT)
    partial(archive, tmp_path).write_bytes(CONTENT[:-5])
    server.faults = [("drip", 20)]
    download(archive, tmp_path, replace(patience, least=1000, attempts=1))
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_a_missing_file_is_an_error_at_once(
    tmp_path: Path, publish: Publish, server: Server, patience: Patience
) -> None:
    archive = publish("a.zip", CONTENT)
    server.files.clear()
    with pytest.raises(ConnectionError, match=r"returned 404 Not Found: fetch a.zip from elsewhere"):
        download(archive, tmp_path, patience)
    assert len(server.ranges) == 1


def test_an_unreachable_server_is_an_error(
    tmp_path: Path, publish: Publish, server: Server, patience: Patience
) -> None:
    archive = publish("a.zip", CONTENT)
    server.http.server_close()
    with pytest.raises(ConnectionError, match=r"in each of 3 attempts \(.*refused"):
        download(archive, tmp_path, patience)
