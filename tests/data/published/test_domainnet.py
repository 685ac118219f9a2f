from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from cl_bench.data.published import domainnet


def listed_file(root: Path, name: str, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a list, and publish its checksum for the length of a test."""
    content = "".join(f"{line}\n" for line in lines).encode()
    (root / name).write_bytes(content)
    monkeypatch.setitem(domainnet.LIST_MD5, name, hashlib.md5(content, usedforsecurity=False).hexdigest())


def test_the_official_numbering_is_not_alphabetical() -> None:
    names = domainnet.names()
    assert len(set(names)) == 345
    assert (names[0], names[344]) == ("aircraft_carrier", "zigzag")
    assert names != sorted(names)


def test_names_in_another_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "\n".join(sorted(domainnet.names()))
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: lines)
    with pytest.raises(
        ValueError, match=r"of DomainNet's classes has the sha256 .* published ba29ce5a210ff5ac…"
    ):
        domainnet.names()


def test_one_variant_lacks_quickdraw() -> None:
    assert len(domainnet.domains("official345")) == 6
    assert set(domainnet.domains("official345")) - set(domainnet.domains("no_quickdraw")) == {"quickdraw"}


def test_a_list_gives_files_labels_and_domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed_file(tmp_path, "real_test.txt", ["real/zigzag/real_345_1.jpg 344"], monkeypatch)
    listed_file(tmp_path, "sketch_test.txt", ["sketch/airplane/sketch_002_1.jpg 1"], monkeypatch)
    listed = domainnet.listed(tmp_path, "test", ["real", "sketch"])
    assert listed.files == ["real/zigzag/real_345_1.jpg", "sketch/airplane/sketch_002_1.jpg"]
    assert (listed.targets, listed.domains) == ([344, 1], [0, 1])


def test_another_list_than_the_official_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real_test.txt").write_text("real/zigzag/real_345_1.jpg 344\n")
    with pytest.raises(ValueError, match="not the official list"):
        domainnet.listed(tmp_path, "test", ["real"])


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"The list {tmp_path}/real_test.txt does not exist"):
        domainnet.listed(tmp_path, "test", ["real"])


@pytest.mark.parametrize(
    "line", ["real/zigzag/a.jpg 343", "real/zigzag/a.jpg 345", "zigzag/a.jpg 344", "a.jpg"]
)
def test_a_label_of_another_class_is_refused(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed_file(tmp_path, "real_test.txt", [line], monkeypatch)
    with pytest.raises(ValueError, match=r"of real_test.txt gives the label"):
        domainnet.listed(tmp_path, "test", ["real"])
