from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cl_bench.contracts.strategy import Strategy
from cl_bench.loop.checkpoint import FOLDER_NAME, Checkpoint, Checkpoints
from cl_bench.loop.course import Diverged
from cl_bench.loop.diagnostics import Diagnostics
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import Features
from cl_bench.results.result import Regime, Result, read
from datamodules.toy import Toy
from strategies.janus_lora import JanusLoRA
from strategies.loda import LoDA
from strategies.lora import LoRA
from strategies.lora_gpm import LoRAGPM
from strategies.ncm import NearestClassMean

SCRIPT = Path(__file__).with_name("killed.py")

# Kills of one cell, one process after another: (place, index of the experience, number of the call there).
KILLS: list[list[Any]] = [
    ["checkpoint", 0, 1],
    ["step", 0, 2],
    ["merge", 0, 2],
    ["result", 0, 1],
    ["pass before training", 1, 1],
    ["new checkpoint", 1, 2],
    ["step", 1, 4],
    ["pass after training", 1, 1],
    ["merge", 1, 1],
    ["evaluation", 1, 1],
    ["restoration", 1, 1],
    ["step", 2, 1],
    ["checkpoint", 2, 3],
    ["evaluation", 2, 2],
]
STRATEGIES = {  # and the kills that each can reach
    "janus_lora": [kill for kill in KILLS if kill[0] != "pass before training"],
    "inflora": KILLS,
    "keeplora": KILLS,
    "loda": KILLS,
}


def killed(folder: Path, runs: list[list[Any]]) -> list[int]:
    """Run each cell in its own process and return the exit statuses, negative for a signal."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], input=json.dumps(runs), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    statuses: list[int] = json.loads(done.stdout.splitlines()[-1])
    return statuses


@pytest.fixture(scope="module")
def attempts(
    chosen: Callable[[str], set[str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[int]]]:
    """The folder of all runs, and the exit statuses of every attempt at a cut one, by strategy."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        [strategy, f"{strategy}-{name}", place]
        for strategy, kills in STRATEGIES.items()
        if strategy in chosen("strategy")
        for name, places in (("whole", [None]), ("cut", [*kills, None]))
        for place in places
    ]
    statuses = killed(folder, runs)
    grouped = groupby(zip(runs, statuses, strict=True), key=lambda pair: pair[0][0])
    return folder, {strategy: [status for _, status in pairs][1:] for strategy, pairs in grouped}


def result_below(folder: Path) -> Result:
    (path,) = folder.rglob("result.json")
    return read(path)


def differing(one: Any, other: Any, name: str = "") -> list[str]:
    """Return the names at which two nested structures of tensors and plain values differ in a bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if torch.equal(one, other) else [name]
    if isinstance(one, dict) and isinstance(other, dict):
        names = sorted(one.keys() | other.keys(), key=str)
        return [n for key in names for n in differing(one.get(key), other.get(key), f"{name}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [n for index, pair in pairs for n in differing(*pair, f"{name}.{index}")]
    return [] if one == other else [name]


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(name, marks=() if name == "inflora" else pytest.mark.soak) for name in STRATEGIES],
)
def test_a_run_killed_inside_every_phase_ends_with_the_same_bits(
    attempts: tuple[Path, dict[str, list[int]]], strategy: str
) -> None:
    folder, statuses = attempts
    assert statuses[strategy] == [-9] * len(STRATEGIES[strategy]) + [0]
    whole, cut = (
        torch.load(folder / f"{strategy}-{name}" / "last.ckpt", weights_only=True)
        for name in ("whole", "cut")
    )
    for key in ("strategy", "random", "loops", "phase", "experience", "trainable"):
        assert differing(whole[key], cut[key], key) == []
    one, other = (result_below(folder / f"{strategy}-{name}") for name in ("whole", "cut"))
    assert (one.rows, one.status, len(one.costs)) == (other.rows, "done", 3)
    resumed = other.provenance["resumed"]
    assert len(resumed) >= 8  # an attempt that was killed before its first checkpoint leaves no trace
    assert not any(entry["differs"] for entry in resumed)
    curves = [next((folder / f"{strategy}-{name}").rglob("metrics.csv")) for name in ("whole", "cut")]
    assert curves[0].read_text() == curves[1].read_text()


class Sends(Callback):
    """Sends a signal to its own process at the start of a batch, counted over the whole stream from 1."""

    def __init__(self, number: int, batch: int) -> None:
        self.number, self.batches = number, batch

    def on_train_batch_start(self, *_: Any) -> None:
        self.batches -= 1
        if self.batches == 0:
            os.kill(os.getpid(), self.number)


Making = Callable[..., Backbone]


def attempt(
    folder: Path,
    strategy: Strategy,
    *callbacks: Callback,
    checkpoints: Checkpoints | None = None,
    regime: Regime = "sequential",
    num_workers: int = 0,
    precision: Any = "32-true",
) -> tuple[Strategy, Result]:
    """Run a cell on the toy stream in this process; checkpoints are in ``folder`` unless others are given."""
    stream = Toy(
        num_classes=6, num_experiences=3, image_size=8, seed=1, batch_size=8, num_workers=num_workers
    )
    trainer = StreamTrainer(max_epochs=2, accelerator="cpu", callbacks=list(callbacks), precision=precision)
    kept = checkpoints or Checkpoints(folder / FOLDER_NAME, "0" * 8)
    return strategy, trainer.run(strategy, stream, regime=regime, folder=folder, checkpoints=kept)


def last_checkpoint(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(max(folder.rglob("*.ckpt")), weights_only=True)
    return found


METHODS: dict[str, Callable[[Backbone], Strategy]] = {
    "JANUS, recording every second step": lambda backbone: JanusLoRA(backbone, rank=4, estimate_every=2),
    "JANUS, free rows and a sketch": lambda backbone: JanusLoRA(
        backbone, rank=4, row_space="free", online_estimation="stream", estimate_every=3
    ),
    "LoDA": lambda backbone: LoDA(backbone, rank=4),
    "LoRA, shared": lambda backbone: LoRA(backbone, rank=4, variant="shared"),
    "LoRA-GPM with GR": lambda backbone: LoRAGPM(backbone, rank=4, rectification=True),
    "NCM": NearestClassMean,
}


@pytest.mark.parametrize(
    ("method", "number"),
    list(
        zip([name for name in METHODS if name != "NCM"], cycle([signal.SIGTERM, signal.SIGINT]), strict=False)
    ),
)
def test_a_signal_saves_between_two_steps_and_the_run_resumes_inside_the_epoch(
    method: str, number: int, backbone: Making, tmp_path: Path
) -> None:
    before = signal.signal(number, signal.default_int_handler)  # shells may start tests that ignore Ctrl-C
    try:
        with pytest.raises(KeyboardInterrupt):
            attempt(tmp_path / "cut", METHODS[method](backbone()), Sends(number, 8))
    finally:
        signal.signal(number, before)
    cut = read(tmp_path / "cut" / "result.json")
    assert (cut.status, cut.error, len(cut.rows)) == ("failed", "Interrupted.", 1)
    saved = last_checkpoint(tmp_path)
    assert (saved["phase"], saved["experience"], saved["epoch"], saved["batches"]) == ("training", 1, 0, 2)
    strategy, result = attempt(tmp_path / "cut", METHODS[method](backbone()))
    whole, expected = attempt(tmp_path / "whole", METHODS[method](backbone()))
    assert differing(strategy.state_dict(), whole.state_dict()) == []
    assert result.rows == expected.rows
    assert not list(tmp_path.rglob("*.ckpt"))


def test_joint_training_resumes_inside_its_epoch_with_worker_processes(
    backbone: Making, tmp_path: Path
) -> None:
    method = METHODS["LoRA, shared"]
    cut = Sends(signal.SIGTERM, 14)
    with pytest.raises(KeyboardInterrupt):
        attempt(tmp_path, method(backbone()), cut, regime="joint", num_workers=1)
    saved = last_checkpoint(tmp_path)
    assert (saved["experience"], saved["epoch"], saved["batches"]) == (0, 1, 5)
    strategy, result = attempt(tmp_path, method(backbone()), regime="joint", num_workers=1)
    whole, expected = attempt(tmp_path / "whole", method(backbone()), regime="joint")
    assert differing(strategy.state_dict(), whole.state_dict()) == []
    assert result.rows == expected.rows


class OneOptimizer(LoRA):
    """One adapter, and one optimizer with a schedule, for the whole stream."""

    optimizer_scope = "stream"

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(
            backbone,
            variant="shared",
            rank=4,
            optimizer=lambda groups: torch.optim.Adam(groups, lr=0.01),
            scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        )

    @property
    def optimizer_state(self) -> dict[str, Any]:
        assert self.kept_optimizer is not None
        return self.kept_optimizer.state_dict()


class CutAfter(Checkpoints):
    """Stops the run as an error would, after the checkpoint before a phase of the second experience."""

    def __init__(self, folder: Path, phase: str, epoch: int) -> None:
        super().__init__(folder / FOLDER_NAME, "0" * 8, every=0)
        self.place = 1, phase, epoch

    def write(self, checkpoint: Checkpoint) -> Path:
        path = super().write(checkpoint)
        if (checkpoint.experience, checkpoint.phase, checkpoint.epoch) == self.place:
            raise ArithmeticError("the power went out")
        return path


@pytest.mark.parametrize(
    ("phase", "epoch"), [("expanded", 0), ("training", 0), ("training", 1), ("merging", 0), ("testing", 0)]
)
def test_an_optimizer_of_the_stream_resumes_from_every_phase_with_its_state(
    phase: str, epoch: int, backbone: Making, tmp_path: Path
) -> None:
    with pytest.raises(ArithmeticError):
        cut_off = CutAfter(tmp_path / "cut", phase, epoch)
        attempt(tmp_path / "cut", OneOptimizer(backbone()), checkpoints=cut_off)
    saved = last_checkpoint(tmp_path)
    assert (saved["experience"], saved["phase"], saved["epoch"]) == (1, phase, epoch)
    resumed, whole = OneOptimizer(backbone()), OneOptimizer(backbone())
    result, expected = (
        attempt(tmp_path / name, strategy)[1] for name, strategy in (("cut", resumed), ("whole", whole))
    )
    assert differing(resumed.state_dict(), whole.state_dict()) == []
    assert differing(resumed.optimizer_state, whole.optimizer_state) == []
    assert len(whole.optimizer_state["param_groups"]) == 4  # the adapters, and the head of each experience
    assert result.rows == expected.rows


@pytest.mark.parametrize("phase", ["expanded", "merging", "testing"])
def test_an_optimizer_of_one_experience_is_in_no_checkpoint_outside_its_steps(
    phase: str, backbone: Making, tmp_path: Path
) -> None:
    with pytest.raises(ArithmeticError):
        attempt(tmp_path, METHODS["LoRA, shared"](backbone()), checkpoints=CutAfter(tmp_path, phase, 0))
    assert last_checkpoint(tmp_path)["training"] == {}


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.parametrize("phase", ["expanded", "training", "testing"])
def test_a_run_resumes_in_the_type_to_which_the_trainer_converts_the_model(
    phase: str, precision: str, backbone: Making, tmp_path: Path
) -> None:
    with pytest.raises(ArithmeticError):
        cut_off = CutAfter(tmp_path / "cut", phase, 0)
        attempt(tmp_path / "cut", OneOptimizer(backbone()), checkpoints=cut_off, precision=precision)
    strategy, result = attempt(tmp_path / "cut", OneOptimizer(backbone()), precision=precision)
    whole, expected = attempt(tmp_path / "whole", OneOptimizer(backbone()), precision=precision)
    assert differing(strategy.state_dict(), whole.state_dict()) == []
    assert result.rows == expected.rows


class InfiniteOnce(LoRA):
    """Its loss is infinite at one step; its gradients and parameters are finite."""

    steps = 0

    def loss(self, features: Tensor | Features, labels: Tensor) -> Tensor:
        self.steps += 1
        return super().loss(features, labels) + (torch.inf if self.steps == 7 else 0)


def test_an_interruption_does_not_hide_a_loss_that_is_not_finite(backbone: Making, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="not finite at step 7"):
        attempt(tmp_path, InfiniteOnce(backbone(), rank=4), Sends(signal.SIGTERM, 8))
    assert read(tmp_path / "result.json").status == "diverged"


class Crashes(Callback):
    """Stops the run as an error would, when the evaluation of the second experience begins."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Strategy)
        if pl_module.experience.index == 1:
            raise ArithmeticError("the power went out")


@pytest.mark.parametrize("method", METHODS)
def test_a_failed_run_resumes_with_its_diagnostics_and_costs(
    method: str, backbone: Making, tmp_path: Path
) -> None:
    with pytest.raises(ArithmeticError):
        attempt(tmp_path / "cut", METHODS[method](backbone()), Diagnostics(), Crashes())
    failed = read(tmp_path / "cut" / "result.json")
    assert failed.error is not None
    assert "The last good checkpoint is" in failed.error
    strategy, result = attempt(tmp_path / "cut", METHODS[method](backbone()), Diagnostics())
    whole, expected = attempt(tmp_path / "whole", METHODS[method](backbone()), Diagnostics())
    assert differing(strategy.state_dict(), whole.state_dict()) == []
    assert (result.rows, result.diagnostics) == (expected.rows, expected.diagnostics)
    assert len(result.costs) == 3
    assert [cost.trainable_parameters for cost in result.costs] == [
        cost.trainable_parameters for cost in expected.costs
    ]


def test_diagnostics_cannot_be_added_to_a_run_that_started_without_them(
    backbone: Making, tmp_path: Path
) -> None:
    with pytest.raises(ArithmeticError):
        attempt(tmp_path, LoDA(backbone(), rank=4), Crashes())
    with pytest.raises(ValueError, match="Drop --diagnostics, or restart with --resume=false"):
        attempt(tmp_path, LoDA(backbone(), rank=4), Diagnostics())


@pytest.mark.soak
def test_a_full_disk_leaves_result_and_checkpoints_from_which_the_run_resumes(tmp_path: Path) -> None:
    full = ["lora", "cut", ["full disk", 1, 3]]
    assert killed(tmp_path, [full])[0] == 1
    result = result_below(tmp_path / "cut")
    assert (result.status, len(result.rows)) == ("failed", 1)
    assert "File too large" in str(result.error)
    assert len([*(tmp_path / "cut").rglob("*.ckpt")]) == 2
    assert not [path for path in (tmp_path / "cut").rglob(".*") if path.is_file()]
    assert killed(tmp_path, [["lora", "cut", None], ["lora", "whole", None]]) == [0, 0]
    assert result_below(tmp_path / "cut").rows == result_below(tmp_path / "whole").rows


@pytest.mark.soak
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_twenty_five_kills_at_random_moments_change_nothing(strategy: str, tmp_path: Path) -> None:
    delays = np.random.RandomState(list(STRATEGIES).index(strategy)).uniform(0.1, 1.5, 60)
    statuses = killed(tmp_path, [[strategy, "cut", delay] for delay in delays] + [[strategy, "cut", None]])
    assert statuses[-1] == 0
    assert set(statuses) <= {0, -signal.SIGKILL}
    assert statuses.count(-signal.SIGKILL) >= 25
    assert killed(tmp_path, [[strategy, "whole", None]]) == [0]
    expected = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)
    for last in tmp_path.glob("cut*/last.ckpt"):  # another run starts after one that has finished
        assert differing(torch.load(last, weights_only=True)["strategy"], expected["strategy"]) == []
        assert result_below(last.parent).rows == result_below(tmp_path / "whole").rows
