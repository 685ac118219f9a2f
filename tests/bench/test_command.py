from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.benchmark import Measurement, TaskSpec

from cl_bench.__main__ import REFUSED, main
from cl_bench.bench import command, group, timing
from cl_bench.bench.command import Wanted, bench
from cl_bench.bench.table import Bench, Row

BACKBONE = {
    "model": "vision_transformer",
    "options": {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
}
KEYS = ["name", "strategy", "experience", "precision", "batch", "median_s", "ratio_to_floor", "images_per_s"]
KEYS.append("peak_bytes")


# What each call is said to take, in seconds, whatever the batch: by name, experience and precision.
SECONDS = {
    ("floor", None, "32-true"): 2.0,
    ("step", 2, "32-true"): 2.2,
    ("step", 20, "32-true"): 2.31,
    ("forward", 2, "32-true"): 0.8,
    ("second moments", 2, "32-true"): 4 * 0.88,  # of four batches
    ("floor", None, "bf16-mixed"): 0.8,
    ("step", 2, "bf16-mixed"): 1.0,
    ("step", 20, "bf16-mixed"): 1.02,
    ("forward", 2, "bf16-mixed"): 0.4,
    ("second moments", 2, "bf16-mixed"): 4 * 0.6,
    "evaluation": 16.0,
    "data": 0.5,
}


def timed(
    calls: Mapping[Any, Callable[[], object]], rounds: int, batches: Mapping[Any, int] | None = None
) -> dict[Any, Measurement]:
    """Make every call, and say what it took; the machine is ten times as slow in the last of three rounds."""
    for call in calls.values():
        call()
    return {
        key: Measurement(number, [SECONDS[key], SECONDS[key], 10 * SECONDS[key]], TaskSpec("", ""))
        for key in calls
        for number in [(batches or {}).get(key, 1)]
    }


@pytest.fixture(scope="module")
def found() -> Bench:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_SIDE", {"cpu": 64})
        patch.setattr(timing, "_SECONDS", 0.01)
        patch.setattr(group, "alternating", timed)
        return bench(Wanted(strategies=["inflora", "loda"], backbone=BACKBONE, batches=[8, 4]))


def rows(found: Bench, *names: str, precision: str = "32-true", strategy: str = "inflora") -> list[Row]:
    return [
        row
        for row in found.rows
        if (row.precision, row.strategy) == (precision, strategy) and row.name in names
    ]


def test_json_holds_what_was_promised_and_nothing_else(found: Bench) -> None:
    content = json.loads(found.json())
    assert list(content) == ["rows", "device", "matrix_tflops"]
    assert content["device"].startswith("cpu") and content["matrix_tflops"] > 0
    assert all(list(row) == KEYS for row in content["rows"])


@pytest.mark.parametrize(
    ("precision", "ratios"), [("32-true", (1.0, 1.1, 1.155)), ("bf16-mixed", (1.0, 1.25, 1.275))]
)
def test_steps_are_held_against_the_floor_of_their_precision(
    found: Bench, precision: str, ratios: tuple[float, float, float]
) -> None:
    steps = rows(found, "floor", "step", precision=precision)
    assert [(row.experience, row.batch) for row in steps] == [(None, 4), (2, 4), (20, 4), (None, 8), (2, 8)]
    assert [row.ratio_to_floor for row in steps] == pytest.approx([*ratios, *ratios[:2]])


def test_images_a_second_are_those_of_the_median_round(found: Bench) -> None:
    speeds = {(row.experience, row.batch): row.images_per_s for row in rows(found, "step")}
    assert speeds == pytest.approx({(2, 4): 4 / 2.2, (20, 4): 4 / 2.31, (2, 8): 8 / 2.2})
    (evaluation,) = rows(found, "evaluation")
    assert evaluation.images_per_s == pytest.approx(4 * 8 / 16)
    assert {row.batch for row in rows(found, "work before", "work after", "turn", "checkpoint")} == {0}


def test_the_peak_is_close_to_that_of_the_floor_and_grows_by_what_a_batch_needs(found: Bench) -> None:
    peaks = {(row.experience, row.batch): row.peak_bytes or 0 for row in rows(found, "floor", "step")}
    for experience in (None, 2):
        # What every backward pass needs of an image: inputs of both norms, of attention and of GELU.
        tokens, width, depth = 17, 64, 2
        needed = 4 * tokens * depth * (2 + 3 + 4) * width
        assert 4 * needed < peaks[experience, 8] - peaks[experience, 4] < 3 * 4 * needed
    to_floor = {(row.experience, row.batch): row.peak_to_floor for row in rows(found, "floor", "step")}
    assert to_floor[None, 4] == 1.0
    assert to_floor[2, 4] == pytest.approx(peaks[2, 4] / peaks[None, 4])
    assert to_floor[2, 8] == pytest.approx(1.0, abs=0.05)


def test_the_text_says_what_a_late_step_costs_beside_an_early_one(found: Bench) -> None:
    text = found.text()
    said = "inflora, 32-true, batch 4: a step in experience 20 over one in 2:"
    assert f"{said} 1.050 [1.050, 1.050]" in text
    whole, apart = map(float, re.findall(rf"{re.escape(said)}.* memory (\S+), and (\S+) apart", text)[0])
    assert whole > 1.01  # heads of twenty experiences, and a basis
    assert apart == pytest.approx(1.0, abs=0.002)


def test_the_text_says_how_much_of_the_peak_the_floor_does_without(found: Bench) -> None:
    said = (
        r"inflora, bf16-mixed, batch 4, experience 20: peak memory (\S+) of the floor's, and (\S+) apart from"
    )
    (numbers,) = re.findall(rf"{said} the (\S+) MB that the method itself keeps and (\S+) MB", found.text())
    whole, apart, kept, masters = map(float, numbers)
    (step,) = [row for row in rows(found, "step", precision="bf16-mixed") if row.experience == 20]
    width, patch, depth = 64, 3 * 8 * 8, 2
    assert masters == pytest.approx(
        4e-6 * ((patch + 1) * width + depth * (12 * width**2 + 9 * width)), abs=0.01
    )
    basis = 4e-6 * depth * width * width  # of all dimensions, at most
    assert 0 < kept < basis + 0.01
    assert step.floor_peak_bytes is not None
    assert whole == pytest.approx(step.peak_to_floor, abs=6e-4)
    printed = 2 * 0.005e6 / step.floor_peak_bytes + 1e-3  # what rounding to two and three digits leaves open
    assert whole - apart == pytest.approx(1e6 * (kept + masters) / step.floor_peak_bytes, abs=printed)


def test_what_happens_once_an_experience_has_rows_of_its_own_for_each(found: Bench) -> None:
    names = ("passes before", "work before", "passes after", "work after", "turn", "checkpoint")
    places = [(row.name, row.experience) for row in rows(found, *names)]
    assert places == [
        *((name, number) for number in (2, 20) for name in names[:4]),
        ("turn", 2),
        ("checkpoint", 2),
    ]


def test_findings_speak_of_precision_passes_and_whole_runs(found: Bench) -> None:
    text = found.text()
    assert "inflora, batch 8: a step in fp32 over one in bf16: 2.200 [2.200, 2.200]" in text
    assert "32-true, batch 8: a second-moment pass over a forward pass: 1.100 [1.100, 1.100]" in text
    assert "bf16-mixed, batch 4: a second-moment pass over a forward pass: 1.500 [1.500, 1.500]" in text


def test_a_whole_run_is_its_steps_and_evaluations_and_a_little_more(found: Bench) -> None:
    said = "inflora, 32-true: ImageNet-R in 10 experiences of 50 epochs would take"
    steps = 24_000 * 50 / 8 * 2.2
    evaluations = 6_000 * 5.5 / 32 * 16.0
    (minutes,) = map(float, re.findall(rf"{said} (\S+) min", found.text()))
    assert (steps + evaluations) / 60 < minutes < 1.02 * (steps + evaluations) / 60


def test_a_turn_is_dearer_than_its_checkpoints(found: Bench) -> None:
    (seconds,), (checkpoint,) = rows(found, "turn"), rows(found, "checkpoint")
    assert 0 < 4 * checkpoint.median_s < seconds.median_s


def test_the_verb_needs_neither_data_nor_avalanche(checkout: Path) -> None:
    code = (
        "import sys; from cl_bench.__main__ import main\n"
        "words = '--strategy lora --backbone small --batch 4 --rounds 1 --precision 32-true --threads 1'\n"
        "assert main(['bench', *words.split(), '--json']) == 0\n"
        "assert 'avalanche' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]
    assert "of the floor" in done.stderr and "profiler" not in done.stderr


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("", Wanted()),
        (
            "--strategy lora loda --backbone small --device cpu --precision 32-true --batch 4 8 --compile",
            Wanted(["lora", "loda"], "small", "cpu", ["32-true"], [4, 8], compiled=True),
        ),
    ],
)
def test_what_the_verb_is_not_told_is_left_to_the_bench(
    words: str, wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Wanted] = []

    def listening(wanted: Wanted, say: Callable[[str], None]) -> Bench:
        asked.append(wanted)
        return Bench("cpu", {"32-true": 1.0})

    monkeypatch.setattr(command, "bench", listening)
    assert main(["bench", *words.split()]) == 0
    assert asked == [wanted]


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
