from __future__ import annotations

import os
from pathlib import Path

import pytest

from cl_bench.results.files import replaced


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
