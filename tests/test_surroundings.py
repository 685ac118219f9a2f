"""What surrounds a command decides nothing: pipes, full disks, home folders, variables of a scheduler."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cl_bench.__main__ import main
from cl_bench.results.result import FILE_NAME, read


def only_result(folder: Path) -> Path:
    (path,) = folder.rglob(FILE_NAME)
    return path


def command(variables: dict[str, str], *words: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a process of its own, with ``variables`` and none that move caches."""
    moving = ("MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in moving}
    return subprocess.run(
        [sys.executable, "-m", "cl_bench", *words],
        env=kept | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_run_finishes_when_nobody_reads_its_output(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe, contextlib.redirect_stdout(pipe):
        assert main(["run", "ncm", "toy", f"--results={tmp_path}", "--trainer.accelerator=cpu"]) == 0
    assert read(only_result(tmp_path)).status == "done"


@pytest.mark.parametrize("words", (["run", "ncm", "toy", "--print_config"], ["run", "--help"]))
def test_a_full_disk_fails_a_command_that_only_prints(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full, contextlib.redirect_stdout(full):
        assert main(words) == 2
    assert capsys.readouterr().err == "error: The output could not be written (No space left on device).\n"


SLURM = {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_NODELIST": "n[1-2]"}
SECOND_RANK = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NNODES": "2"}


@pytest.mark.parametrize(
    ("home", "variables"),
    (
        ("empty", SLURM | SECOND_RANK),
        pytest.param("file/none", {}, marks=pytest.mark.soak),
        pytest.param(
            "empty",
            SLURM | {"SLURM_PROCID": "0", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NAME": "alloc"},
            marks=pytest.mark.soak,
        ),
        pytest.param("empty", SLURM | {"RANK": "1", "LOCAL_RANK": "1"}, marks=pytest.mark.soak),
    ),
)
def test_a_run_needs_no_home_folder_and_reads_no_rank_of_a_session(
    home: str, variables: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    words = ["run", "ncm", "toy", f"--results={tmp_path / 'results'}", "--trainer.accelerator=cpu"]
    done = command({"HOME": str(tmp_path / home)} | variables, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(path := only_result(tmp_path)) in done.stdout
    assert read(path).status == "done"
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_tilde_is_the_home_folder_in_every_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["run", "ncm", "toy", "--results=~/one", "--trainer.accelerator=cpu"]) == 0
    (tmp_path / "grid.yaml").write_text("{strategies: [ncm], datasets: [toy], results: ~/one}")
    assert main(["grid", "~/grid.yaml", "--dry-run"]) == 0
    assert main(["report", "~/one"]) == 0
    assert read(only_result(tmp_path / "one")).status == "done"
    assert not (tmp_path / "~").exists()
