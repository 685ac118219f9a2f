from __future__ import annotations

import json
import sys

import pytest
import torch

from cl_bench.__main__ import REFUSED, main


def test_the_verb_prints_json_without_data_and_avalanche(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cl_bench.data.avalanche", None)  # importing it is an error
    words = "--strategy lora --backbone small --batch 4 --rounds 1 --precision 32-true --threads 1"
    assert main(["bench", *words.split(), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["rows"]
    assert "ratio_to_floor" in printed.err and "profiler" not in printed.err


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("--strategy lroa", "There is no strategy 'lroa'. Did you mean lora?"),
        ("--strategy ncm --backbone small --batch 4", "ncm trains nothing, so it has no step to measure."),
        ("--backbone vit_bse_patch16_224", "Did you mean vit_base_patch16_224?"),
        ("--precision bf16", "There is no precision 'bf16'. Choose among 32-true, bf16-mixed."),
        ("--device gpu", "There is no device 'gpu'. Did you mean cpu?"),
        ("--batch 1", "A batch shows images of four classes: give --batch 4 or more."),
        ("--rounds 0", "0 rounds measure nothing: give --rounds 1 or more."),
        ("--threads 0", "0 threads cannot measure: give --threads 1 or more."),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    words: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words.split()]) == REFUSED
    assert answer in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees a CUDA device")
def test_a_missing_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda"]) == REFUSED
    assert "choose --device cpu" in capsys.readouterr().err
