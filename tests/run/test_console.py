import io
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from cl_bench.results.result import read
from cl_bench.run.configuration import layers, resolve
from cl_bench.run.console import RunConsole, closing_lines, opening_lines
from cl_bench.run.run import RunFailed, finished, quiet, run


class Interrupted(Callback):
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise ArithmeticError


def test_a_resumed_run_prints_its_checkpoint_and_what_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = resolve(
        layers("lora", "toy"), [f"--results={tmp_path}", "--trainer.accelerator=cpu", "--max_epochs=1"]
    )
    with quiet(), pytest.raises(RunFailed):
        run(configuration, [Interrupted()])
    output = io.StringIO()
    monkeypatch.setattr(torch, "__version__", "1.0")
    with quiet():
        run(configuration, [RunConsole(Console(file=output, width=200))])
    line, warning, *_ = output.getvalue().splitlines()
    assert line == "resumes from a checkpoint: experience 1, testing"
    assert warning.startswith("warning: the result may differ in bits from a run in one go: torch ")
    assert warning.endswith(" then and 1.0 now")
    assert output.getvalue().count("resumes from") == 1


def test_a_resumed_run_names_the_damaged_checkpoints(tmp_path: Path) -> None:
    configuration = resolve(
        layers("lora", "toy"), [f"--results={tmp_path}", "--trainer.accelerator=cpu", "--max_epochs=1"]
    )
    with quiet(), pytest.raises(RunFailed):
        run(configuration, [Interrupted()])
    last = configuration.checkpoints.last
    assert last is not None
    last.write_bytes(last.read_bytes()[:1000])
    output = io.StringIO()
    with quiet():
        run(configuration, [RunConsole(Console(file=output, width=200))])
    line = output.getvalue().splitlines()[0]
    assert line == f"resumes from experience 1, merging, because these checkpoints are damaged: {last.name}"


def test_a_terminal_shows_a_bar_and_one_line_for_each_experience(tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    configuration = resolve(
        layers("lora", "toy"), [f"--results={tmp_path}", "--trainer.accelerator=cpu", "--max_epochs=2"]
    )
    with quiet():
        result = run(configuration, [RunConsole(console)])
    text = output.getvalue()
    assert "epoch 2/2" in text
    assert text.count("accuracy over") == 3
    assert opening_lines(configuration).startswith("LoRA on toy-T3")
    assert closing_lines(result, configuration.folder).startswith("LoRA (merge): ")
    path = finished(configuration)
    assert path is not None
    assert read(path) == result
    assert str(path) in closing_lines(result, configuration.folder)


def test_the_first_line_contains_the_printed_name_of_the_method(tmp_path: Path) -> None:
    opening = [
        opening_lines(resolve(layers(name, "toy"), [f"--results={tmp_path}"])).partition(" on toy")[0]
        for name in ("janus_lora", "ncm", "joint")
    ]
    assert opening == ["JANUS-LoRA", "NCM", "LoRA (joint)"]
