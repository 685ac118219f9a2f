from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from cl_bench.data.published import domainnet
from cl_bench.prepare import archives
from cl_bench.prepare.archives import Archive, require_whole

CONTENT = b"a small archive"
PUBLISHED = Archive(
    "http://example.org/a.tar",
    len(CONTENT),
    hashlib.md5(CONTENT, usedforsecurity=False).hexdigest(),
    hashlib.sha256(CONTENT).hexdigest(),
)


def test_the_published_file_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    done: list[int] = []
    require_whole(tmp_path / "a.tar", PUBLISHED, done.append)
    assert sum(done) == len(CONTENT)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"size": 14}, "has 15 bytes, not the published 14"),
        ({"md5": "0" * 32}, "has the md5 .*, not the published 0{32}"),
        ({"sha256": "0" * 64}, "has the sha256 .*, not the published 0{64}"),
    ],
)
def test_any_other_file_is_refused(change: dict[str, object], fault: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    with pytest.raises(ValueError, match=f"a.tar {fault}: remove it and run again"):
        require_whole(tmp_path / "a.tar", replace(PUBLISHED, **change))  # type: ignore[arg-type]


def test_an_address_names_its_file() -> None:
    assert PUBLISHED.name == "a.tar"
    assert archives.IMAGENET_TRAIN.name == "ILSVRC2012_img_train.tar"


def test_domainnet_is_six_domains_and_their_lists_with_one_checksum_each() -> None:
    lists = {archive.name: archive.md5 for archive in archives.DOMAINNET if not archive.unpacks}
    assert lists == domainnet.LIST_MD5
    assert tuple(archive.unpacks for archive in archives.DOMAINNET if archive.unpacks) == domainnet.DOMAINS
    cleaned = {archive.unpacks for archive in archives.DOMAINNET if "/groundtruth/" in archive.url}
    assert cleaned == {"clipart", "painting"}
