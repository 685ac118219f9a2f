from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cl_bench.grid.engine import Value
from cl_bench.grid.local import LocalEngine
from cl_bench.grid.sharing import require_shared


class Elsewhere(LocalEngine):
    """Workers that see another folder at the same path, as on a machine that does not mount it."""

    def __init__(self, seen: Path, mounted: Path) -> None:
        super().__init__()
        self._seen, self._mounted = seen, mounted

    def call(self, function: Callable[[], Value]) -> list[Value]:
        aside = self._seen.with_name("aside")
        self._seen.rename(aside)
        if self._mounted.exists():
            self._mounted.rename(self._seen)
        try:
            return super().call(function)
        finally:
            if self._seen.exists():
                self._seen.rename(self._mounted)
            aside.rename(self._seen)


def test_checking_a_shared_folder_leaves_no_files(tmp_path: Path) -> None:
    require_shared(tmp_path / "results", LocalEngine())
    assert not list((tmp_path / "results").iterdir())


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_a_worker_does_not_see_is_refused_with_its_machine(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "theirs").mkdir()
    engine = Elsewhere(tmp_path / "results", tmp_path / "theirs")
    with pytest.raises(
        ValueError, match=f"does not see the results folder {tmp_path}/results as this machine"
    ):
        require_shared(tmp_path / "results", engine)


class Lost(LocalEngine):
    """Workers whose files never appear here."""

    def call(self, function: Callable[[], Value]) -> list[Value]:
        values: Sequence[Any] = super().call(function)
        for path in self._folder.glob(".token-*-*"):
            path.unlink()
        return list(values)

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder


def test_a_folder_in_which_files_of_workers_do_not_appear_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mount one folder under the same path on every machine"):
        require_shared(tmp_path, Lost(tmp_path))
