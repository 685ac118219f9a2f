"""A grid on the local engine, with a cell that fails and a cell whose process dies."""

import contextlib
import io
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cl_bench.__main__ import INTERRUPTED, main
from cl_bench.grid.cells import read_grid
from cl_bench.grid.command import known
from cl_bench.grid.local import LocalEngine
from cl_bench.grid.work import Outcome
from cl_bench.results.result import FILE_NAME, read

STRATEGIES = """
import os
import time
from pathlib import Path

from strategies.linear_probe import LinearProbe


class Failing(LinearProbe):
    name = "failing"

    def after_training(self, data):
        raise ArithmeticError("no basis left")


class Recorded(LinearProbe):
    name = "recorded"

    def before_training(self, data):
        super().before_training(data)
        here = Path(__file__).parent
        if self.experience.index == 0:
            print("begun")
            with (here / "begun").open("a") as begun:
                begun.write(f"{self.trainer.datamodule.seed}\\n")
        while not (here / "go").exists():
            time.sleep(0.05)


class Dying(LinearProbe):
    name = "dying"

    def after_training(self, data):
        os.kill(os.getpid(), 9)
"""


@dataclass
class Ran:
    """The results of a grid."""

    folder: Path
    grid: Path
    status: int
    output: str


def grid(path: Path, results: Path, *words: str) -> tuple[int, str]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = main(["grid", str(path), "--results", str(results), *words])
    return status, output.getvalue()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("grid")
    (folder / "broken_strategies.py").write_text(STRATEGIES)
    for name in ("Failing", "Dying"):
        config = folder / f"{name.lower()}.yaml"
        config.write_text(f"model: {{class_path: broken_strategies.{name}}}")
    path = folder / "grid.yaml"
    path.write_text(
        f"strategies: [{folder}/dying.yaml, {folder}/failing.yaml, ncm, lora]\n"
        "datasets: [toy]\n"
        "common: {trainer.accelerator: cpu, trainer.max_epochs: 3, model.optimizer.lr: 0.01}\n"
    )
    status, output = grid(path, folder / "results", "--workers", "2")
    return Ran(folder / "results", path, status, output)


def test_failed_cells_do_not_stop_the_rest_and_are_listed_with_their_errors(ran: Ran) -> None:
    assert ran.status == 1
    assert "2 of 4 cells done" in ran.output
    assert "ArithmeticError" in "".join(path.read_text() for path in ran.folder.rglob("log.txt"))
    assert "no basis left" in ran.output
    assert "ended with exit code -9" in ran.output
    done = {
        result.strategy for path in ran.folder.rglob(FILE_NAME) if (result := read(path)).status == "done"
    }
    assert done == {"NCM", "LoRA (merge)"}


def test_a_failed_cell_has_its_status_and_its_traceback_in_files(ran: Ran) -> None:
    (error,) = ran.folder.rglob("error.txt")
    assert read(error.parent / FILE_NAME).status == "failed"
    assert "ArithmeticError: no basis left" in error.read_text()


def test_finished_cells_are_skipped_and_a_dry_run_runs_nothing(ran: Ran) -> None:
    before = {path: path.stat().st_mtime_ns for path in ran.folder.rglob("*")}
    status, output = grid(ran.grid, ran.folder, "--dry-run")
    assert status == 0
    assert "4 cells, 2 done" in output
    assert output.count("to run") == 2
    assert {path: path.stat().st_mtime_ns for path in ran.folder.rglob("*")} == before


def test_a_cell_of_a_grid_gives_the_same_result_as_its_own_command(ran: Ran, tmp_path: Path) -> None:
    words = ["--trainer.max_epochs=3", "--model.optimizer.lr=0.01", "--trainer.accelerator=cpu"]
    assert main(["run", "lora", "toy", *words, "--results", str(tmp_path)]) == 0
    (single,) = tmp_path.rglob(FILE_NAME)
    (in_grid,) = ran.folder.glob(f"toy-T3/lora/*/{FILE_NAME}")
    assert in_grid.parent.name == single.parent.name
    assert read(in_grid).rows == read(single).rows
    curves = "curves/metrics.csv"
    assert (in_grid.parent / curves).read_text() == (single.parent / curves).read_text()


def test_a_wrong_setting_of_one_cell_is_refused_before_any_cell_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("{strategies: [ncm, lora], datasets: [toy], settings: {lora: {a: {rnak: 2}}}}")
    assert main(["grid", str(path), "--results", str(tmp_path / "results")]) == 2
    assert "Did you mean model.rank?" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_the_same_cell_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("{strategies: [lora], datasets: [toy], settings: {lora: {a: {rank: 10}, b: {}}}}")
    assert main(["grid", str(path), "--results", str(tmp_path / "results"), "--dry-run"]) == 2
    assert "contains this cell twice" in capsys.readouterr().err


def test_a_grid_starts_every_cell_when_nobody_reads_its_output(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("{strategies: [ncm], datasets: [toy], seeds: [1, 2], common: {trainer.accelerator: cpu}}")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe, contextlib.redirect_stdout(pipe):
        assert main(["grid", str(path), "--results", str(tmp_path / "results"), "--workers", "1"]) == 0
    assert [read(file).status for file in tmp_path.rglob(FILE_NAME)] == ["done", "done"]


def test_two_grids_with_one_results_folder_run_no_cell_twice(tmp_path: Path) -> None:
    (tmp_path / "recorded_strategies.py").write_text(STRATEGIES)
    (tmp_path / "recorded.yaml").write_text("model: {class_path: recorded_strategies.Recorded}")
    path = tmp_path / "grid.yaml"
    path.write_text(
        f"strategies: [{tmp_path}/recorded.yaml]\n"
        "datasets: [toy]\nseeds: [1, 2, 3, 4]\ncommon: {trainer.accelerator: cpu}\n"
    )
    begun, results = tmp_path / "begun", tmp_path / "results"
    jobs = [entry.job(waits=False) for entry in known([*read_grid(str(path), results).cells()])]
    outcomes: list[Outcome] = []
    other = threading.Thread(
        target=LocalEngine(workers=1).run,
        args=(jobs, lambda job: None, lambda job, outcome: outcomes.append(outcome)),
    )
    other.start()
    while not begun.exists():  # the other grid runs the first cell, which waits
        time.sleep(0.05)
    threading.Thread(target=let_go_at, args=(2, begun)).start()
    status, output = grid(path, results, "--workers", "1")
    other.join()
    assert (status, output.count("ACC")) == (0, 4)
    assert "4 of 4 cells done" in output
    assert sorted(begun.read_text().split()) == ["1", "2", "3", "4"]
    assert [log.read_text().split().count("begun") for log in results.rglob("log.txt")] == [1] * 4
    assert {outcome.error for outcome in outcomes if not outcome.held} == {None}


@pytest.mark.soak
def test_a_grid_terminated_while_its_first_cell_starts_does_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recorded_strategies.py").write_text(STRATEGIES)
    (tmp_path / "recorded.yaml").write_text("model: {class_path: recorded_strategies.Recorded}")
    (tmp_path / "go").touch()
    path = tmp_path / "grid.yaml"
    path.write_text(
        f"{{strategies: [{tmp_path}/recorded.yaml], datasets: [toy], common: {{trainer.accelerator: cpu}}}}"
    )
    while_next_cell_starts(monkeypatch, lambda forkserver: os.kill(os.getpid(), signal.SIGTERM))
    status, _ = grid(path, tmp_path / "results")
    assert status == INTERRUPTED
    assert not (tmp_path / "begun").exists()


@pytest.mark.soak
def test_a_cell_killed_while_it_starts_fails_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("{strategies: [ncm], datasets: [toy], seeds: [1, 2], common: {trainer.accelerator: cpu}}")
    while_next_cell_starts(monkeypatch, lambda forkserver: os.kill(forkserver, signal.SIGKILL))
    status, output = grid(path, tmp_path / "results", "--workers", "1")
    assert status == 1
    assert output.count("The process of the cell could not be started (") == 1
    assert "1 of 2 cells done" in output


def let_go_at(number: int, begun: Path) -> None:
    """Let the cells continue once ``number`` of them have started."""
    while len(begun.read_text().split()) < number:
        time.sleep(0.05)
    (begun.parent / "go").touch()


def while_next_cell_starts(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """Call ``act`` with the id of the forkserver of the next cell while it imports its modules.

    The forkserver starts with that cell, and not while the command still reads its grid.
    """

    def forkservers() -> list[int]:
        words = ["pgrep", "-P", str(os.getpid()), "-f", "multiprocessing.forkserver"]
        found = subprocess.run(words, capture_output=True, text=True, check=False).stdout
        return [int(pid) for pid in found.split()]

    def watch() -> None:
        while not (found := forkservers()):
            time.sleep(0.05)
        act(found[0])

    monkeypatch.setattr("cl_bench.grid.work.begin_imports", lambda: None)
    for warm in forkservers():
        os.kill(warm, signal.SIGKILL)
    while forkservers():
        time.sleep(0.05)
    threading.Thread(target=watch, daemon=True).start()
