from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cl_bench.bench import timing
from cl_bench.bench.command import Wanted, bench
from cl_bench.bench.table import Bench
from cl_bench.cli import REFUSED, main

BACKBONE = {
    "model": "vision_transformer",
    "options": {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
}
KEYS = ["name", "strategy", "experience", "precision", "batch", "median_s", "ratio_to_floor", "images_per_s"]
KEYS.append("peak_bytes")


@pytest.fixture(scope="module")
def found() -> Bench:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_SIDE", {"cpu": 64})
        patch.setattr(timing, "_SECONDS", 0.01)
        return bench(Wanted(strategies=["inflora", "loda"], backbone=BACKBONE, batches=[8, 4], rounds=1))


def test_json_holds_what_was_promised_and_nothing_else(found: Bench) -> None:
    content = json.loads(found.json())
    assert list(content) == ["rows", "device", "matrix_tflops"]
    assert content["device"].startswith("cpu") and content["matrix_tflops"] > 0
    assert all(list(row) == KEYS for row in content["rows"])


def test_steps_are_held_against_the_floor_of_their_precision_and_batch(found: Bench) -> None:
    steps = {
        (row.strategy, row.experience, row.precision, row.batch): row
        for row in found.rows
        if row.name in ("floor", "step")
    }
    assert {place[1::2] for place in steps} == {(None, 4), (2, 4), (20, 4), (None, 8), (2, 8)}
    for (strategy, _, precision, batch), row in steps.items():
        floor = steps[strategy, None, precision, batch]
        assert row.ratio_to_floor == pytest.approx(row.median_s / floor.median_s)
        assert row.images_per_s == pytest.approx(batch / row.median_s)
        assert row.peak_bytes is not None and row.peak_bytes > 0


def test_a_peak_grows_with_the_batch_and_a_late_step_needs_no_more_than_what_the_method_keeps(
    found: Bench,
) -> None:
    peaks = {
        (row.experience, row.batch): row.peak_bytes or 0
        for row in found.rows
        if (row.name, row.strategy, row.precision) == ("step", "inflora", "32-true")
    }
    assert peaks[2, 8] > 1.1 * peaks[2, 4]
    assert peaks[20, 4] < 1.05 * peaks[2, 4]


def test_passes_work_images_and_evaluation_have_rows(found: Bench) -> None:
    assert {row.name for row in found.rows} == {
        *("floor", "step", "forward", "second moments", "data", "evaluation"),
        *("passes before", "passes after", "work before", "work after"),
    }


def test_findings_speak_of_growth_precision_passes_and_whole_runs(found: Bench) -> None:
    text = found.text()
    for words in (
        "inflora, bf16-mixed, batch 4: a step in experience 20 over one in 2",
        "inflora, batch 8: a step in fp32 over one in bf16",
        "bf16-mixed, batch 8: a second-moment pass over a forward pass",
        "ImageNet-R in 10 experiences of 50 epochs would take",
        "what else there is between experiences",
        "of matrix rate",
    ):
        assert words in text


def test_the_verb_needs_neither_data_nor_avalanche(checkout: Path) -> None:
    code = (
        "import sys; from cl_bench.cli import main\n"
        "words = '--strategy lora --backbone small --batch 4 --rounds 1 --precision 32-true --threads 1'\n"
        "assert main(['bench', *words.split(), '--json']) == 0\n"
        "assert 'avalanche' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]
    assert "of the floor" in done.stderr


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("--strategy lroa", "There is no strategy 'lroa'. Did you mean lora?"),
        ("--backbone vit_bse_patch16_224", "Did you mean vit_base_patch16_224?"),
        ("--precision bf16", "There is no precision 'bf16' here. Choose among 32-true, bf16-mixed."),
        ("--device gpu", "There is no device 'gpu'. Did you mean cpu?"),
        ("--batch 1", "A batch shows images of four classes: give --batch 4 or more."),
        ("--rounds 0", "0 rounds measure nothing: give --rounds 1 or more."),
    ],
)
def test_what_cannot_be_measured_is_answered_in_a_sentence(
    words: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words.split()]) == REFUSED
    assert answer in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda"]) == REFUSED
    assert "choose --device cpu" in capsys.readouterr().err
