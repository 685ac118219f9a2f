from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cl_bench.survey import command, worker
from cl_bench.survey.command import Survey, survey
from cl_bench.survey.plan import SIZES, Task, plan
from cl_bench.survey.worker import Found

SIZE = replace(SIZES["rehearsal"], workers=1, batches=(4,), images=4)
SETUP: Found = {"device": "cpu", "size": "rehearsal", "torch": "2", "commit": None, "cores": 1, "failed": []}


class Here:
    """Makes rows in this process: a real one spends six seconds on imports."""

    answer: Callable[[Task, Path], Found] = staticmethod(worker.made)
    made: ClassVar[list[str]] = []

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder

    def found(self, task: Task, seconds: float) -> Found | None:
        self.made.append(task.name)
        found = type(self).answer(task, self.folder)
        return found and {**found, "seconds": 0.0}

    def close(self) -> None:
        pass


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> type[Here]:
    monkeypatch.setattr(Here, "made", [])
    monkeypatch.setattr(command, "Worker", Here)
    return Here


def answering(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> None:
    def answer(task: Task, folder: Path) -> Found:
        found: Found = {"setup": SETUP, **answers}.get(task.name.replace("/", "_"), {"failed": []})
        return found

    monkeypatch.setattr(Here, "answer", staticmethod(answer))


def surveyed(folder: Path, *rows: str, seconds: float = 60.0, device: str = "cpu") -> Survey:
    return survey(folder, SIZE, device, seconds=seconds, chosen=rows)


def names(folder: Path) -> list[str]:
    return [json.loads(line)["name"] for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_three_rows_of_the_rehearsal_fill_the_tables(here: type[Here], tmp_path: Path) -> None:
    found = surveyed(tmp_path, "tiny/inflora_b5", "eager/linear", "stream/loading")
    assert found.complete, found.text
    check, loading, steps = found.rows
    assert check["counts_equal"] and check["same_bits"] and check["apart"] == 0
    assert check["no_wait"] is None and check["reasons"]["no_wait"] == "Only CUDA reports it."
    assert steps["steps"]["4"]["images_per_s"] > 0 and steps["graphs"] == 0
    assert loading["loader_images_per_s"] > 0 and 0 <= loading["waiting"] < 1
    assert (tmp_path / "table.md").read_text() == found.text
    assert "| linear_probe | 4 |" in found.text
    assert "| inflora_b5 | yes | 0e+00 | 1e-08 | yes | – |" in found.text


def test_a_second_call_makes_only_what_is_missing(
    here: type[Here], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch)
    assert surveyed(tmp_path, "tiny/lora", seconds=-1.0).missing == ["tiny/lora", *GPM_AND_DRS]
    assert not (tmp_path / "rows.jsonl").read_text().count("tiny")
    surveyed(tmp_path, "tiny/lora_gpm")
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"name": "tiny/lora", "fai')  # a process that was killed while it wrote
    here.made.clear()
    found = surveyed(tmp_path, "tiny/lora")
    assert sorted(here.made) == ["setup", "tiny/lora", "tiny/lora_drs", "tiny/lora_drs_gr"]
    assert sorted(names(tmp_path)) == ["setup", "tiny/lora", *GPM_AND_DRS] and found.complete


GPM_AND_DRS = ["tiny/lora_drs", "tiny/lora_drs_gr", "tiny/lora_gpm", "tiny/lora_gpm_gr"]


def test_a_failed_row_ends_no_other_and_is_listed(
    here: type[Here], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, tiny_sd_lora={"failed": ["It broke."]}, tiny_sd_lora_kd=None)
    found = surveyed(tmp_path, "tiny/sd_lora", seconds=1_000)
    assert not found.complete and not found.missing
    assert "- tiny/sd_lora: It broke." in found.text
    assert "- tiny/sd_lora_kd: It took more than 60 s." in found.text
    assert names(tmp_path)[-1] == "tiny/sd_lora_rr"


def test_a_row_that_the_end_of_the_time_cuts_off_is_not_written(
    here: type[Here], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, tiny_ncm=None)
    found = surveyed(tmp_path, "tiny/ncm", seconds=30.0)
    assert found.missing == ["tiny/ncm"] and names(tmp_path) == ["setup"]
    assert "Missing; the same command makes them:\n\n- tiny/ncm" in found.text


def test_rows_of_another_device_are_not_continued(
    here: type[Here], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch)
    surveyed(tmp_path, "tiny/ncm")
    answering(monkeypatch, setup=SETUP | {"device": "NVIDIA H200"})
    with pytest.raises(ValueError, match="are of device cpu, and device is NVIDIA H200 now"):
        surveyed(tmp_path, "tiny/ncm")


def test_without_a_gpu_the_survey_of_one_is_refused(here: type[Here], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sees no CUDA device"):
        surveyed(tmp_path, "tiny/ncm", device="cuda")


def test_both_sizes_make_the_same_rows_the_most_valuable_first() -> None:
    full, rehearsal = ([task.name for task in plan(SIZES[name], "cpu")] for name in ("full", "rehearsal"))
    assert full == rehearsal and len(set(full)) == len(full)
    assert full[0].startswith("tiny/") and full.index("eager/lora") < full.index("vit/lora")
