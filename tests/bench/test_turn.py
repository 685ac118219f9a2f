from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cl_bench.bench.turn import Turn, turn
from cl_bench.loop.checkpoint import FOLDER_NAME, Checkpoints
from cl_bench.results.result import FILE_NAME
from cl_bench.run.configs import Config
from cl_bench.run.run import quiet
from strategies.lora import LoRA


def measured(stem: str, backbone: Config, folder: Path) -> Turn:
    stream = {"image_size": 16, "batch_size": 4}
    with quiet():
        return turn(stem, backbone=backbone, trainer={"accelerator": "cpu"}, stream=stream, folder=folder)


@pytest.mark.parametrize("stem", ["inflora", "keeplora", "janus_lora", "loda"])
def test_a_turn_is_that_of_a_whole_run(stem: str, backbone: Config, tmp_path: Path) -> None:
    found = measured(stem, backbone, tmp_path)
    assert 0 < 4 * found.checkpoint < found.seconds
    result = json.loads((tmp_path / FILE_NAME).read_text())
    assert result["status"] == "done" and len(result["rows"]) == 2
    assert not (tmp_path / FOLDER_NAME).exists()


def slower(call: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return call(*args, **kwargs)

    return called


def test_a_turn_holds_its_checkpoints_and_no_step_pass_or_evaluation(
    backbone: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints, "write", slower(Checkpoints.write, 0.02))
    for name in ("training_step", "after_training", "test_step"):
        monkeypatch.setattr(LoRA, name, slower(getattr(LoRA, name), 0.5))
    found = measured("lora", backbone, tmp_path)
    assert found.checkpoint > 0.02
    assert 4 * 0.02 < found.seconds < 0.5
