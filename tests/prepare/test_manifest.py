from __future__ import annotations

import gzip
from pathlib import Path

from cl_bench.prepare import manifest
from cl_bench.prepare.manifest import Variant
from cl_bench.prepare.scanning import Scanned

IMAGES = [Scanned("b.jpg", 2, "22", 3, 4), Scanned("a.jpg", 1, "11", 5, 6)]
VARIANT = Variant("split coda", 24_000, 6_000, 200, "a" * 64, "b" * 64)


def test_what_is_written_is_read_and_depends_on_no_order(tmp_path: Path) -> None:
    contents = []
    for images in (IMAGES, IMAGES[::-1]):
        manifest.write(tmp_path, "mine", images, [VARIANT])
        contents.append([(tmp_path / name).read_bytes() for name in (manifest.FILE_NAME, manifest.LIST_NAME)])
    assert contents[0] == contents[1]
    assert manifest.read(tmp_path, "mine") == [VARIANT]
    lines = gzip.decompress((tmp_path / manifest.LIST_NAME).read_bytes()).decode().splitlines()
    assert lines == ["a.jpg\t1\t11\t5\t6", "b.jpg\t2\t22\t3\t4"]


def test_no_manifest_and_another_datasets_are_none(tmp_path: Path) -> None:
    assert manifest.read(tmp_path, "mine") is None
    manifest.write(tmp_path, "other", IMAGES, [VARIANT])
    assert manifest.read(tmp_path, "mine") is None
    (tmp_path / manifest.FILE_NAME).write_text("no json")
    assert manifest.read(tmp_path, "other") is None


def test_a_missing_or_changed_image_is_noticed(tmp_path: Path) -> None:
    manifest.write(tmp_path, "mine", IMAGES, [VARIANT])
    assert manifest.changed(tmp_path) == "a.jpg"
    (tmp_path / "a.jpg").write_bytes(b"1")
    assert manifest.changed(tmp_path) == "b.jpg"
    (tmp_path / "b.jpg").write_bytes(b"22")
    assert manifest.changed(tmp_path) is None
    (tmp_path / "b.jpg").write_bytes(b"333")
    assert manifest.changed(tmp_path) == "b.jpg"


def test_a_variant_is_one_line() -> None:
    assert VARIANT.line() == f"split coda: 24,000 + 6,000 images, 200 classes, sha256 {'a' * 16} + {'b' * 16}"
