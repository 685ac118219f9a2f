from __future__ import annotations

import gzip
import io
import shutil
import stat
import tarfile
import tracemalloc
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cl_bench.prepare.unpacking import unpack

NOISE = np.random.RandomState(0).bytes(1_000_000)
"""Always the same, since some bytes of a bz2 that packs other noise can change without any effect."""

FILES = {"data/a/1.jpg": b"one" * 1000, "data/b/2.jpg": b"two" * 1000}


def tar(path: Path, change: Callable[[tarfile.TarFile], None] = lambda _: None, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in FILES.items():
            add(archive, name, content)
        change(archive)
    return path


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def special(name: str, kind: bytes, target: str = "") -> Callable[[tarfile.TarFile], None]:
    def change(archive: tarfile.TarFile) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        archive.addfile(member)

    return change


def zipped(path: Path, more: dict[str | zipfile.ZipInfo, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (FILES | (more or {})).items():
            archive.writestr(name, content)
    return path


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder to unpack into, in a folder of its own."""
    (tmp_path / "inside").mkdir()
    return tmp_path / "inside"


def refused(archive: Path, root: Path, fault: str) -> None:
    """Check that the archive is refused in one sentence and leaves nothing, in the root or around it."""
    before = content(root.parent)
    with pytest.raises(ValueError, match=fault) as caught:
        unpack(archive, "data", root)
    assert "\n" not in str(caught.value)
    assert content(root.parent) == before
    assert [path for path in root.iterdir() if path != archive] == []


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_is_unpacked(root: Path, mode: str) -> None:
    archive = tar(root / "a.tar", mode=mode)
    done: list[int] = []
    unpack(archive, "data", root, done.append)
    archive.unlink()
    assert content(root) == FILES
    assert sum(done) == 6000


def test_a_zip_is_unpacked(root: Path) -> None:
    archive = zipped(root / "a.zip")
    unpack(archive, "data", root)
    archive.unlink()
    assert content(root) == FILES


@pytest.mark.parametrize("name", ["../out.jpg", "data/../../out.jpg", "/tmp/out.jpg", "data/..\\..\\out.jpg"])
def test_a_name_outside_the_folder_is_refused(root: Path, name: str) -> None:
    fault = "which lies outside its folder: remove the archive"
    refused(tar(root / "a.tar", lambda archive: add(archive, name, b"out")), root, fault)
    (root / "a.tar").unlink()
    if "\\" not in name:  # zipfile writes such a name with slashes
        refused(zipped(root / "a.zip", {name: b"out"}), root, fault)


@pytest.mark.parametrize("target", ["2.jpg", "/etc/passwd", "../../../out"])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_a_tar_is_refused(root: Path, kind: bytes, target: str) -> None:
    refused(tar(root / "a.tar", special("data/link", kind, target)), root, "'data/link', a link: remove")


def test_a_link_in_a_zip_is_refused(root: Path) -> None:
    link = zipfile.ZipInfo("data/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    refused(zipped(root / "a.zip", {link: b"/etc/passwd"}), root, "'data/link', a link: remove")


@pytest.mark.parametrize("kind", [tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_a_device_is_refused(root: Path, kind: bytes) -> None:
    refused(tar(root / "a.tar", special("data/device", kind)), root, "neither a file nor a folder")


def test_a_bomb_is_refused_before_it_grows(root: Path) -> None:
    zeros = bytes(40_000_000)
    fault = "would grow from .* to more than .*, which no archive of pictures does"
    refused(zipped(root / "a.zip", {"data/zeros": zeros}), root, fault)
    (root / "a.zip").unlink()
    bomb = tar(root / "a.tar", lambda archive: add(archive, "data/zeros", zeros), mode="w:gz")
    refused(bomb, root, fault)
    bomb.unlink()
    with gzip.open(root / "a.tar", "wb") as stream:  # what follows the last entry is read and counted
        with tarfile.open(fileobj=stream, mode="w") as archive:
            add(archive, "data/1.jpg", b"one")
        stream.write(zeros)
    refused(root / "a.tar", root, fault)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [3584, 3585, 3700, 4095, 7168])
def test_a_tar_that_ends_at_or_inside_a_later_header_is_refused(
    length: int, packed: bool, root: Path
) -> None:
    """The entries end at bytes 3584 and 7168; tarfile takes what it cannot read there for the end."""
    archive = tar(root / "a.tar")
    content = archive.read_bytes()[:length]
    archive.write_bytes(gzip.compress(content) if packed else content)
    refused(archive, root, f"is damaged or truncated \\(.* at byte {length // 3584 * 3584:,}\\)")


def test_a_tar_with_a_damaged_later_header_is_refused(root: Path) -> None:
    archive = tar(root / "a.tar")
    damaged = bytearray(archive.read_bytes())
    damaged[3584 + 5] ^= 0xFF  # in the name of the second entry
    archive.write_bytes(damaged)
    refused(archive, root, r"is damaged or truncated \(bad checksum at byte 3,584\)")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE])
def test_a_giant_header_is_refused_without_being_read(kind: bytes, root: Path) -> None:
    first, header = tarfile.TarInfo("data/1.jpg"), tarfile.TarInfo("data/long")
    header.type, header.size = kind, 10**9
    with gzip.open(root / "a.tar", "wb", compresslevel=1) as stream:
        stream.write(first.tobuf(tarfile.GNU_FORMAT) + header.tobuf(tarfile.GNU_FORMAT))
        for _ in range(50):
            stream.write(bytes(1_000_000))
    tracemalloc.start()
    refused(root / "a.tar", root, r"is damaged or truncated \(a header of 1\.0 GB\)")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_a_tar_of_countless_empty_entries_is_refused(root: Path) -> None:
    def fill(archive: tarfile.TarFile) -> None:
        for number in range(5000):
            add(archive, f"data/{number}", b"")

    archive = tar(root / "a.tar", fill, mode="w:gz")
    refused(archive, root, "would grow from .* to more than .*, which no archive of pictures does")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_a_truncated_tar_is_refused(root: Path, mode: str, share: float) -> None:
    archive = tar(root / "a.tar", lambda opened: add(opened, "data/c", NOISE[:20_000]), mode=mode)
    with archive.open("r+b") as stream:
        stream.truncate(int(share * archive.stat().st_size))
    refused(archive, root, "is damaged or truncated")


@pytest.mark.parametrize(
    ("mode", "place"), [("w:gz", -8), ("w:gz", 300), ("w:xz", -30), ("w:xz", 300), ("w:bz2", 300)]
)
def test_a_compressed_tar_with_a_flipped_byte_is_refused(root: Path, mode: str, place: int) -> None:
    archive = tar(root / "a.tar", lambda opened: add(opened, "data/c", NOISE[:2000]), mode=mode)
    damaged = bytearray(archive.read_bytes())
    damaged[place] ^= 0xFF
    archive.write_bytes(damaged)
    refused(archive, root, "is damaged or truncated")


def test_damage_in_the_second_block_of_a_bz2_is_refused(root: Path) -> None:
    archive = tar(root / "a.tar", lambda opened: add(opened, "data/c", NOISE), mode="w:bz2")
    assert len(NOISE) > 900_000  # the size of a block
    damaged = bytearray(archive.read_bytes())
    damaged[-300] ^= 0xFF
    archive.write_bytes(damaged)
    refused(archive, root, "is damaged or truncated")


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_truncated_zip_is_refused(root: Path, share: float) -> None:
    archive = zipped(root / "a.zip")
    with archive.open("r+b") as stream:
        stream.truncate(int(share * archive.stat().st_size))
    refused(archive, root, "is damaged or truncated")


def test_a_zip_with_wrong_checksums_is_refused(root: Path) -> None:
    archive = zipped(root / "a.zip")
    damaged = bytearray(archive.read_bytes())
    damaged[60] ^= 0xFF
    archive.write_bytes(damaged)
    refused(archive, root, "is damaged or truncated")


def test_a_file_that_is_not_an_archive_is_refused(root: Path) -> None:
    (root / "a.tar").write_bytes(b"no archive" * 100)
    refused(root / "a.tar", root, "is damaged or truncated")


def test_an_archive_of_something_else_is_refused(root: Path) -> None:
    archive = tar(root / "a.tar")
    with pytest.raises(ValueError, match="has no folder other: it is another archive"):
        unpack(archive, "other", root)
    assert [path.name for path in root.iterdir()] == ["a.tar"]


def test_a_full_disk_is_an_error_before_unpacking(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 5_000, 5_000))
    with pytest.raises(
        OSError, match=r"has 5.0 kB free and 6.0 kB are needed to unpack a.tar: free some space"
    ):
        unpack(tar(root / "a.tar"), "data", root)
    assert [path.name for path in root.iterdir()] == ["a.tar"]
