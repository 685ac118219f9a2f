from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cl_bench.survey.agreement import Outcome, agreement, check

FORGETS = """
from strategies.lora import LoRA


class Forgets(LoRA):
    def before_training(self, data):
        super().before_training(data)
        self.scale = 0.9

    def after_step(self):
        for _, adapter in self.adapters():
            adapter.B.mul_(getattr(self, "scale", 1.0))
"""


def outcome(value: float, correct: int) -> Outcome:
    return Outcome({"weight": torch.tensor([value, 1.0])}, [[correct]], peak=0)


def test_a_strategy_that_forgets_when_it_is_cut_off_fails(tmp_path: Path) -> None:
    (tmp_path / "forgetful.py").write_text(FORGETS)
    (tmp_path / "forgets.yaml").write_text("model: {class_path: forgetful.Forgets}")
    found = check(str(tmp_path / "forgets.yaml"), {}, "cpu")
    (failure,) = found["failed"]
    assert failure.startswith("repeated: ") and "differ after a run was cut off and resumed" in failure
    assert found["counts_equal"] and not found["same_bits"]


@pytest.mark.parametrize(
    ("device", "problem"),
    [
        (outcome(1.0 + 1e-4, 3), "weight differ from those on the CPU, by up to 1.0e-04, where 1.0e-05"),
        (outcome(1.0 + 9e-6, 4), "counts of correct predictions differ"),
        (outcome(float("nan"), 3), "weight differ"),
        (Outcome({}, [[3]], 0), "weight exist on one device"),
    ],
)
def test_a_device_that_computes_otherwise_is_found(device: Outcome, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        agreement(device, outcome(1.0, 3), outcome(1.0 + 1e-5, 3))


def test_counts_that_a_nudge_changes_are_not_compared() -> None:
    found: dict[str, Any] = agreement(outcome(1.0, 4), outcome(1.0, 3), outcome(1.0 + 1e-5, 5))
    assert found["counts_equal"] is False
