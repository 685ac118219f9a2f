from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cl_bench.results.tuning import Tuning, from_plain, read

RECORD = Tuning(
    strategy="lora",
    dataset="toy",
    space={"optimizer.lr": {"low": 1e-4, "high": 1e-2}, "rank": {"choices": [4, 8]}},
    budget={"trials": 3.0},
    on="first:3",
    metric="maa/sample",
    val_fraction=0.2,
    seed=0,
    order="identity",
    fixed=[],
    settings={"optimizer.lr": [0.001, 0.002, 0.003], "rank": [4, None, 8]},
    scores=[50.0, None, 60.0],
    experiences=[3, 3, 3],
    spent={"trials": 3.0},
    best=2,
    runner_up=0,
)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    RECORD.write(tmp_path / "record.json")
    assert read(tmp_path / "record.json") == RECORD
    assert RECORD.chosen == {"optimizer.lr": 0.003, "rank": 8}
    assert RECORD.settings_of(1) == {"optimizer.lr": 0.002}


@pytest.mark.parametrize(
    ("changed", "sentence"),
    (
        ({"scores": [50.0, None]}, "a setting does not have a value for each of its 2 trials"),
        ({"best": 1}, "its best is not one of its 3 trials"),
        ({"best": 3}, "its best is not one of its 3 trials"),
        ({"runner_up": 7}, "its best is not one of its 3 trials"),
        ({"best": -1}, "best: Input should be greater than or equal to 0"),
        ({"scores": [50.0, float("nan"), 60.0]}, "scores"),
        ({"order": {"a": 1}}, "order"),
        ({"sensitivity": {"key": "a", "factors": [1.0], "scores": []}}, "a score for each factor"),
    ),
)
def test_a_record_that_contradicts_itself_is_refused(changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        from_plain(asdict(RECORD) | changed)


def test_another_file_is_not_taken_for_a_record(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps({"strategy": "lora"}))
    with pytest.raises(ValueError, match=r"other\.json is not a record of cl-bench tune: dataset: "):
        read(tmp_path / "other.json")
    with pytest.raises(FileNotFoundError, match=r"There is no record .*: run cl-bench tune first"):
        read(tmp_path / "missing.json")
