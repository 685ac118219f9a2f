from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_bench.loop.checkpoint import Checkpoint, Checkpoints, Owner, Refused

OWNER = Owner(cell="12345678", strategy="strategies.lora.LoRA", weights_sha256="ab" * 32)


def checkpoint(**changes: Any) -> Checkpoint:
    arguments: dict[str, Any] = {
        "owner": OWNER,
        "phase": "training",
        "experience": 2,
        "epoch": 4,
        "circumstances": {"threads": 1, "torch": "2.14"},
        "strategy": {"tensors": {"head.weight": torch.arange(3.0)}},
        "random": [{"torch": torch.get_rng_state()}],
        "loops": {"epoch": 4},
    }
    return Checkpoint(**arguments | changes)


def kept(folder: Path) -> Checkpoints:
    return Checkpoints(folder, OWNER.cell)


def test_a_checkpoint_names_its_place_and_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = kept(tmp_path).write(checkpoint())
    assert path.name == "000001-experience3-training.ckpt"
    found, damaged = kept(tmp_path).latest(OWNER)
    assert damaged == []
    assert found is not None
    assert (found.phase, found.experience, found.epoch, found.owner) == ("training", 2, 4, OWNER)
    assert found.place == "experience 3, training after 4 epochs"
    assert torch.equal(found.strategy["tensors"]["head.weight"], torch.arange(3.0))


def test_an_empty_folder_has_nothing_to_resume_from(tmp_path: Path) -> None:
    assert kept(tmp_path / "none").latest(OWNER) == (None, [])
    kept(tmp_path / "none").clear()


def test_the_last_two_are_kept_and_clearing_removes_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for experience in range(11):
        kept(folder).write(checkpoint(experience=experience))
    assert sorted(path.name[:6] for path in folder.iterdir()) == ["000010", "000011"]
    kept(folder).clear()
    assert not folder.exists()


def test_the_end_of_an_epoch_writes_one_only_after_a_while(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, "", every=0).due
    assert not Checkpoints(tmp_path, "", every=60).due
    with pytest.raises(ValueError, match="cannot be written every -1 seconds: give 0 or more"):
        Checkpoints(tmp_path, "", every=-1)


def cut_off(content: bytes) -> bytes:
    return content[:300]


def another_start(content: bytes) -> bytes:
    return b"X" + content[1:]


def another_number(content: bytes) -> bytes:
    place = content.index(torch.arange(3.0).numpy().tobytes())
    return content[:place] + b"\x01" + content[place + 1 :]


@pytest.mark.parametrize("damage", [cut_off, another_start, another_number])
def test_a_damaged_file_is_skipped_and_named(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    kept(tmp_path).write(checkpoint(experience=0))
    newest = kept(tmp_path).write(checkpoint(experience=1))
    newest.write_bytes(damage(newest.read_bytes()))
    found, damaged = kept(tmp_path).latest(OWNER)
    assert found is not None
    assert found.experience == 0
    assert damaged == [newest.name]


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".000001-experience1-testing.ckpt.123").touch()
    kept(tmp_path).write(checkpoint())
    assert [path.name for path in tmp_path.iterdir()] == ["000001-experience3-training.ckpt"]


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/nonexistent/made by a checkpoint",)


def test_a_file_that_would_run_code_is_refused_without_running_it(tmp_path: Path) -> None:
    kept(tmp_path).write(checkpoint(circumstances={"threads": Evil()}))
    with pytest.raises(Refused, match=r"reading it could run code: remove its folder to restart the cell"):
        kept(tmp_path).latest(OWNER)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"owner": Owner("87654321", OWNER.strategy, OWNER.weights_sha256)},
            "belongs to cell 87654321, and this run",
        ),
        (
            {"owner": Owner(OWNER.cell, "mine.Mine", OWNER.weights_sha256)},
            "belongs to strategy mine.Mine, and",
        ),
        ({"owner": Owner(OWNER.cell, OWNER.strategy, "cd" * 32)}, "belongs to backbone cdcd"),
        ({"schema": 99}, "has schema 99, and this version reads 1: remove its folder"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    kept(tmp_path).write(checkpoint(**change))
    with pytest.raises(Refused, match=words):
        kept(tmp_path).latest(OWNER)


def test_differing_circumstances_are_named() -> None:
    now = {"threads": 2, "torch": "2.14", "processes": 2}
    assert checkpoint().differences(now) == {"threads": [1, 2], "processes": [None, 2]}
