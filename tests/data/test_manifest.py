from __future__ import annotations

import gzip
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from cl_bench.data import manifest
from cl_bench.data.manifest import (
    Manifest,
    Scanned,
    Variant,
    fingerprint,
    order_fingerprint,
    require_fingerprint,
    require_order,
)

IMAGES = [Scanned("b.jpg", 2, "22", 3, 4), Scanned("a.jpg", 1, "11", 5, 6)]
VARIANT = Variant("split coda", 24_000, 6_000, 200, "a" * 64, "b" * 64)


def test_a_manifest_is_read_back_and_depends_on_no_order(tmp_path: Path) -> None:
    contents = []
    for images in (IMAGES, IMAGES[::-1]):
        manifest.write(tmp_path, "mine", images, [VARIANT])
        contents.append([(tmp_path / name).read_bytes() for name in (manifest.FILE_NAME, manifest.LIST_NAME)])
    assert contents[0] == contents[1]
    assert manifest.read(tmp_path, "mine") == Manifest([VARIANT], IMAGES[::-1])
    lines = gzip.decompress((tmp_path / manifest.LIST_NAME).read_bytes()).decode().splitlines()
    assert lines == ["a.jpg\t1\t11\t5\t6", "b.jpg\t2\t22\t3\t4"]


def test_a_missing_manifest_and_another_datasets_are_none(tmp_path: Path) -> None:
    assert manifest.read(tmp_path, "mine") is None
    manifest.write(tmp_path, "other", IMAGES, [VARIANT])
    assert manifest.read(tmp_path, "mine") is None
    (tmp_path / manifest.FILE_NAME).write_text("no json")
    assert manifest.read(tmp_path, "other") is None


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "of another preparation"])
def test_a_manifest_without_its_own_list_is_none(tmp_path: Path, damage: str) -> None:
    manifest.write(tmp_path, "mine", IMAGES, [VARIANT])
    path = tmp_path / manifest.LIST_NAME
    packed = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(packed[:-12])
    elif damage == "flipped":
        path.write_bytes(packed[:20] + bytes([packed[20] ^ 0xFF]) + packed[21:])
    elif damage == "of another preparation":
        path.write_bytes(gzip.compress(b"a.jpg\t1\t11\t5\t6\n", mtime=0))
    assert manifest.read(tmp_path, "mine") is None
    path.write_bytes(packed)
    assert manifest.read(tmp_path, "mine") is not None


def test_a_missing_or_changed_image_is_detected(tmp_path: Path) -> None:
    assert manifest.changed(tmp_path, IMAGES[::-1]) == "a.jpg"
    (tmp_path / "a.jpg").write_bytes(b"1")
    assert manifest.changed(tmp_path, IMAGES[::-1]) == "b.jpg"
    (tmp_path / "b.jpg").write_bytes(b"22")
    assert manifest.changed(tmp_path, IMAGES[::-1]) is None
    (tmp_path / "b.jpg").write_bytes(b"333")
    assert manifest.changed(tmp_path, IMAGES[::-1]) == "b.jpg"


def test_a_variant_is_described_in_one_line() -> None:
    assert replace(VARIANT, images_sha256="c" * 64).line() == f"{VARIANT.line()}, files {'c' * 16}"
    assert VARIANT.line() == f"split coda: 24,000 + 6,000 images, 200 classes, sha256 {'a' * 16} + {'b' * 16}"


def test_the_hash_of_files_covers_bytes_and_names_in_any_order() -> None:
    sha256 = manifest.images_sha256(IMAGES)
    assert manifest.images_sha256(IMAGES[::-1]) == sha256
    for changed in (replace(IMAGES[1], sha256="33"), replace(IMAGES[1], path="c.jpg")):
        assert manifest.images_sha256([IMAGES[0], changed]) != sha256


def test_variants_are_read_without_the_list(tmp_path: Path) -> None:
    assert manifest.variants(tmp_path, "mine") == []
    manifest.write(tmp_path, "mine", IMAGES, [VARIANT])
    (tmp_path / manifest.LIST_NAME).unlink()
    assert manifest.variants(tmp_path, "mine") == [VARIANT]


def test_the_order_of_a_list_does_not_matter_and_its_content_does() -> None:
    assert fingerprint(["b", "a"]) == fingerprint(["a", "b"]) == hashlib.sha256(b"a\nb").hexdigest()
    assert fingerprint(["a", "c"]) != fingerprint(["a", "b"])


def test_another_list_is_refused_by_name() -> None:
    require_fingerprint("mine", ["a"], fingerprint(["a"]))
    with pytest.raises(ValueError, match="The list mine has the sha256"):
        require_fingerprint("mine", ["b"], fingerprint(["a"]))


def test_another_order_is_refused_if_order_matters() -> None:
    require_order("mine", ["b", "a"], order_fingerprint(["b", "a"]))
    with pytest.raises(ValueError, match="The list mine has the sha256"):
        require_order("mine", ["a", "b"], order_fingerprint(["b", "a"]))
