"""The engine on SLURM, through submitit, whose local executor starts jobs as processes of this machine."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from cl_bench.grid.cells import read_grid
from cl_bench.grid.command import known, run_waiting
from cl_bench.grid.slurm import SlurmEngine
from cl_bench.results import FILE_NAME, read

STRATEGY = """
import os

from strategies.linear_probe import LinearProbe


class Dying(LinearProbe):
    name = "dying"

    def after_training(self, data):
        os._exit(3)
"""


def test_cells_run_as_jobs_and_one_that_dies_is_said(tmp_path: Path) -> None:
    (tmp_path / "dying_strategy.py").write_text(STRATEGY)
    (tmp_path / "dying.yaml").write_text("model: {class_path: dying_strategy.Dying}")
    path = tmp_path / "grid.yaml"
    path.write_text(
        f"{{strategies: [ncm, {tmp_path}/dying.yaml], datasets: [toy], common: {{trainer.accelerator: cpu}}}}"
    )
    results = tmp_path / "results"
    entries = known([*read_grid(str(path), results).cells()])
    printed = io.StringIO()
    engine = SlurmEngine(results, workers=1, gpus_per_cell=None, parameters={}, cluster="local")
    assert not run_waiting(entries, engine, Console(file=printed, soft_wrap=True))
    assert "1 of 2 cells done" in printed.getvalue()
    assert "The job of the cell ended without a word; see " in printed.getvalue()
    statuses = {result.strategy: result.status for file in results.rglob(FILE_NAME) if (result := read(file))}
    assert statuses == {"NCM": "done", "dying": "running"}
    assert not list(results.glob(".token*"))


def test_slurm_where_there_is_none_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no SLURM on this machine"):
        SlurmEngine(tmp_path, workers=None, gpus_per_cell=1, parameters={})


def test_a_time_that_is_no_number_of_minutes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="The time of a job cannot be 1-00:00: write minutes, as in time=240"
    ):
        SlurmEngine(tmp_path, None, None, {"time": "1-00:00"}, cluster="local")


def test_half_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SLURM gives whole GPUs to a job, not 0\.5"):
        SlurmEngine(tmp_path, workers=None, gpus_per_cell=0.5, parameters={}, cluster="local")


def test_a_parameter_that_sbatch_does_not_have_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--slurm cannot be used as it is: Unknown argument 'partitoin'"):
        SlurmEngine(tmp_path, None, None, {"partitoin": "gpu"}, cluster="local")
