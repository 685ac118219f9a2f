"""The engine on SLURM, with submitit's local executor, which starts jobs as processes of this machine."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from cl_bench.grid.cells import read_grid
from cl_bench.grid.command import known, run_waiting
from cl_bench.grid.slurm import SlurmEngine
from cl_bench.results.result import FILE_NAME, read

STRATEGY = """
import os
import signal

from strategies.linear_probe import LinearProbe


class Dying(LinearProbe):
    name = "dying"

    def after_training(self, data):
        os._exit(3)


class Terminated(LinearProbe):
    name = "terminated"

    def after_training(self, data):
        os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("ddp", (False, pytest.param(True, marks=pytest.mark.soak)))
def test_jobs_survive_sigterm_and_failed_ones_are_listed(ddp: bool, tmp_path: Path) -> None:
    (tmp_path / "slurm_strategies.py").write_text(STRATEGY)
    for name in ("Dying", "Terminated"):
        (tmp_path / f"{name.lower()}.yaml").write_text(f"model: {{class_path: slurm_strategies.{name}}}")
    path = tmp_path / "grid.yaml"
    settings = "settings: {ncm: {two: {trainer.devices: 2, trainer.strategy: ddp}}}\n" if ddp else ""
    path.write_text(
        f"strategies: [{tmp_path}/terminated.yaml, {tmp_path}/dying.yaml{', ncm' * ddp}]\n"
        "datasets: [toy]\n"
        "common: {trainer.accelerator: cpu}\n"
        f"{settings}"
    )
    results = tmp_path / "results"
    entries = known([*read_grid(str(path), results).cells()])
    printed = io.StringIO()
    engine = SlurmEngine(results, workers=1, gpus_per_cell=None, parameters={}, cluster="local")
    assert not run_waiting(entries, engine, Console(file=printed, soft_wrap=True))
    assert f"1 of {2 + ddp} cells done" in printed.getvalue()
    refusal = "A run in several processes starts its own command again, and a cell"
    assert (refusal in printed.getvalue()) == ddp
    assert "The job of the cell ended without an outcome; see " in printed.getvalue()
    statuses = {result.strategy: result.status for file in results.rglob(FILE_NAME) if (result := read(file))}
    assert statuses == {"terminated": "done", "dying": "running"}
    assert not list(results.glob(".token*"))


def test_a_machine_without_slurm_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="SLURM is not installed on this machine"):
        SlurmEngine(tmp_path, workers=None, gpus_per_cell=1, parameters={})


def test_a_time_that_is_not_a_number_of_minutes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="The time of a job cannot be 1-00:00: write minutes, as in time=240"
    ):
        SlurmEngine(tmp_path, None, None, {"time": "1-00:00"}, cluster="local")


def test_half_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SLURM gives whole GPUs to a job, not 0\.5"):
        SlurmEngine(tmp_path, workers=None, gpus_per_cell=0.5, parameters={}, cluster="local")


def test_an_unknown_parameter_of_sbatch_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--slurm cannot be used: Unknown argument 'partitoin'"):
        SlurmEngine(tmp_path, None, None, {"partitoin": "gpu"}, cluster="local")
