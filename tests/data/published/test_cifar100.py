from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest

from cl_bench.data.published import cifar100


def write(root: Path, name: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a batch, and publish its checksum for the length of a test."""
    (root / cifar100.FOLDER).mkdir(exist_ok=True)
    (root / cifar100.FOLDER / name).write_bytes(content)
    monkeypatch.setitem(cifar100.MD5, name, hashlib.md5(content, usedforsecurity=False).hexdigest())


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pixels_are_planes_and_become_rgb(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8)
    write(tmp_path, "test", pickle.dumps({"data": data, "fine_labels": [7, 3]}, protocol), monkeypatch)
    pixels, labels = cifar100.images(tmp_path, "test")
    assert pixels.shape == (2, 32, 32, 3)
    assert labels == [7, 3]
    # Row 1, column 2 of the second image: a value from each of its three planes.
    assert pixels[1, 1, 2].tolist() == data[1, [34, 1024 + 34, 2048 + 34]].tolist()


def test_another_file_is_refused_before_it_is_unpickled(tmp_path: Path) -> None:
    (tmp_path / cifar100.FOLDER).mkdir()
    (tmp_path / cifar100.FOLDER / "test").write_bytes(pickle.dumps({"data": 0}))
    with pytest.raises(ValueError, match="is not the published file"):
        cifar100.images(tmp_path, "test")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cl-bench prepare cifar100"):
        cifar100.names(tmp_path)


class Touch:
    """An object that creates a file when it is unpickled without restriction."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    trap = tmp_path / "touched"
    hostile = pickle.dumps({"fine_labels": Touch(trap)})
    with pytest.raises(ValueError, match=r"batch is refused \(it names .*, which no array needs\)"):
        cifar100.restricted(hostile, "batch")
    assert not trap.exists()
    pickle.loads(hostile)
    assert trap.exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1])[:-3]])
def test_content_that_is_not_a_pickle_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="batch is refused"):
        cifar100.restricted(content, "batch")


def test_a_pickle_without_a_mapping_is_refused() -> None:
    with pytest.raises(ValueError, match="batch does not hold a mapping"):
        cifar100.restricted(pickle.dumps([1]), "batch")
