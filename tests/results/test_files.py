from __future__ import annotations

import os
import unicodedata
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cl_bench.results.files import file_name, file_names, replaced


def test_a_file_appears_whole_without_a_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "file"
    with replaced(path) as stream:
        stream.write(b"all of it")
        assert not path.exists()
    assert path.read_bytes() == b"all of it"
    assert os.listdir(path.parent) == ["file"]


def test_an_error_keeps_the_old_file_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replaced(path) as stream:
        stream.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@given(st.text())
@example("x/../../../../ESCAPED")
@example("/etc/passwd")
@example("..")
@example("nul\x00")
@example("CON")
@example("con.txt")
@example("n" * 5_000)
@example("\U0001f600" * 200)
def test_a_file_name_is_one_name_on_every_system(text: str) -> None:
    text = text.encode(errors="replace").decode()
    name = file_name(text)
    assert name == PurePosixPath(name).name == PureWindowsPath(name).name
    assert not set(name) & set('<>:"/\\|?*\x00')
    assert name.isprintable()
    assert 0 < len(name.encode()) < 120
    assert not name.startswith((".", "-"))
    assert not name.endswith((".", " "))
    assert name.partition(".")[0].upper() not in {"CON", "PRN", "AUX", "NUL", "COM1", "LPT9"}


@pytest.mark.parametrize("text", ["digits-T5", "imagenet_r-T10-0123abcd", "v1.2", "données-T3"])
def test_an_ordinary_name_stays_as_it_is(text: str) -> None:
    assert file_name(text) == text


def test_texts_that_differ_only_where_they_are_cleaned_have_two_names() -> None:
    texts = ["a/b", "a:b", "a_b", "A_b", "a_B", "caf\u00e9", "cafe\u0301", "a_b-2"]
    names = file_names(texts)
    assert list(names) == texts
    assert len({unicodedata.normalize("NFD", name).casefold() for name in names.values()}) == len(texts)
