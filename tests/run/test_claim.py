"""Locks on cells between processes, and how a run uses them."""

import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from cl_bench.__main__ import main
from cl_bench.results.result import FILE_NAME, read
from cl_bench.run import claim as claiming
from cl_bench.run.claim import Held, claim
from cl_bench.run.configuration import Configuration, layers, resolve
from cl_bench.run.run import run

SHORT = 0.6


@pytest.fixture(autouse=True)
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claiming, "_LEASE_SECONDS", SHORT)
    monkeypatch.setattr(claiming, "_BEAT_SECONDS", SHORT / 6)
    monkeypatch.setattr(claiming, "_LOOK_SECONDS", SHORT / 6)


HOLD = f"""
import socket, sys
from pathlib import Path

socket.gethostname = lambda: sys.argv[2]

from cl_bench.run import claim

claim._LEASE_SECONDS, claim._BEAT_SECONDS = {SHORT}, {SHORT / 6}
with claim.claim(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def holder(path: Path, machine: str = socket.gethostname()) -> Iterator["subprocess.Popen[str]"]:
    """Another process, which holds the lock until its input ends."""
    command = [sys.executable, "-c", HOLD, str(path), machine]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()


def let_go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.close()


def test_a_running_process_keeps_its_lock_and_is_named(tmp_path: Path) -> None:
    with (
        holder(tmp_path / "cell") as process,
        pytest.raises(Held, match=f"run by process {process.pid} on "),
        claim(tmp_path / "cell"),
    ):
        pass


def test_the_lock_of_a_dead_process_is_free_at_once(tmp_path: Path) -> None:
    with holder(tmp_path / "cell") as process:
        kill(process)
        with claim(tmp_path / "cell"):  # does not wait
            assert (tmp_path / "cell").exists()
    assert not (tmp_path / "cell").exists()


def test_a_process_on_another_machine_loses_its_lock_soon_after_its_death(
    tmp_path: Path,
) -> None:
    sentences: list[str] = []
    with holder(tmp_path / "cell", "elsewhere") as process:
        deadline = time.monotonic() + 3 * SHORT
        while time.monotonic() < deadline:
            with pytest.raises(Held, match="on elsewhere"), claim(tmp_path / "cell"):
                pass
            time.sleep(SHORT / 6)
        kill(process)
        killed = time.monotonic()
        with claim(tmp_path / "cell", sentences.append):
            assert time.monotonic() - killed > SHORT / 2  # no earlier sign of its death
    assert sentences == [f"This cell is being run by process {process.pid} on elsewhere."]


def toy(results: Path, *overrides: str) -> Configuration:
    words = [f"--results={results}", "--trainer.accelerator=cpu", *overrides]
    return resolve(layers("linear_probe", "toy"), words)


def claim_of(configuration: Configuration) -> Path:
    return configuration.results / configuration.benchmark / ".claims" / configuration.hash


STOPPED = f"""
import os, signal, sys

from lightning.pytorch import Callback

from cl_bench.run import claim

claim._LEASE_SECONDS, claim._BEAT_SECONDS = {SHORT}, {SHORT / 6}

from cl_bench.run.configuration import layers, resolve
from cl_bench.run.run import run


class Stop(Callback):
    def on_test_start(self, trainer, pl_module):
        if trainer.datamodule.experience.index == 1:
            print("stops", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
            if sys.argv[2] == "fails":
                raise ArithmeticError


try:
    run(resolve(layers("linear_probe", "toy"), [f"--results={{sys.argv[1]}}", "--accelerator=cpu"]), [Stop()])
except claim.Held as error:
    print(error)
"""


class Continue(Callback):
    """Lets a stopped process continue, and waits for its end, in the middle of a run."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.printed = ""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGCONT)
            self.printed, _ = self.process.communicate(timeout=120)


@pytest.mark.parametrize(
    ("successor", "ending"),
    (("runs", "continues"), pytest.param("is done", "fails", marks=pytest.mark.soak)),
)
def test_a_process_stopped_beyond_its_lease_writes_nothing_when_it_is_back(
    successor: str, ending: str, tmp_path: Path
) -> None:
    configuration = toy(tmp_path)
    command = [sys.executable, "-c", STOPPED, str(tmp_path), ending]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        back = Continue(process)
        try:
            assert process.stdout is not None and process.stdout.readline() == "stops\n"
            result = run(configuration, [back] if successor == "runs" else [], wait=lambda _: None)
            written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
            if successor == "is done":
                back.on_test_start(Trainer(), LightningModule())
        finally:
            process.kill()
    assert "was stopped for more than 0.6 seconds and lost the cell" in back.printed
    assert result.status == read(configuration.folder / FILE_NAME).status == "done"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == written
    assert [path.name for path in configuration.folder.iterdir()].count("error.txt") == 0
    whole = toy(tmp_path / "whole")
    run(whole)
    curves = "curves/metrics.csv"
    assert (configuration.folder / curves).read_text() == (whole.folder / curves).read_text()


def test_a_waiting_run_reads_the_result_of_the_other_and_trains_nothing(tmp_path: Path) -> None:
    done, waiting = toy(tmp_path / "one"), toy(tmp_path / "two", "--setting=named")
    first = run(done)
    sentences: list[str] = []

    with holder(claim_of(waiting)) as process:

        def finish(sentence: str) -> None:
            sentences.append(sentence)
            shutil.copytree(done.folder, waiting.results / waiting.benchmark / "other" / done.folder.name)
            let_go(process)

        second = run(waiting, wait=finish)
    assert len(sentences) == 1
    assert second.provenance == first.provenance  # which contains the time of its start
    assert second.rows == first.rows
    assert not (waiting.folder / FILE_NAME).exists()


def test_a_waiting_run_runs_the_cell_if_the_other_process_dies(tmp_path: Path) -> None:
    configuration = toy(tmp_path)
    with holder(claim_of(configuration)) as process:
        result = run(configuration, wait=lambda _: kill(process))
    assert result.status == "done"


def test_the_second_of_two_commands_for_a_cell_prints_that_it_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configuration = toy(tmp_path)
    command = ["run", "linear_probe", "toy", f"--results={tmp_path}", "--trainer.accelerator=cpu"]
    with holder(claim_of(configuration)) as process:
        threading.Timer(SHORT, let_go, [process]).start()
        assert main(command) == 0
    assert f"run by process {process.pid} on " in (printed := capsys.readouterr().out)
    assert "Waiting for its result." in printed
    assert read(configuration.folder / FILE_NAME).status == "done"
