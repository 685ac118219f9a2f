"""What every engine does with one cell, wherever it runs."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from multiprocessing.connection import Connection, wait
from pathlib import Path

from cl_bench.errors import sentence
from cl_bench.grid.cells import Cell
from cl_bench.run.claim import Held

LOG_NAME = "log.txt"

# Importing the stack takes seconds; a cell forked from a process that has done so starts in milliseconds.
_PRELOAD = ["cl_bench.run.run", "cl_bench.grid.work", "avalanche.benchmarks", "sklearn.datasets", "timm"]
_FAREWELL_SECONDS = 30.0
_BURIAL_SECONDS = 1.0  # a forkserver that is killed is replaced once it is gone from the process table


@dataclass(frozen=True)
class Job:
    """One cell to run.

    Attributes:
        cell: The words of its command.
        folder: Its folder, where its output goes to ``log.txt``.
        threads: CPU threads that it computes with.
        patient: Whether it waits for another process that runs the same cell.
    """

    cell: Cell
    folder: Path
    threads: int
    patient: bool = False

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.folder / LOG_NAME


@dataclass(frozen=True)
class Ending:
    """How a job ended.

    Attributes:
        error: What went wrong, in one sentence; None if nothing did.
        held: Whether nothing was run because another process runs the cell.
    """

    error: str | None = None
    held: bool = False


# Starting or joining a process reads the exit status of every child that has ended, and it can be read once:
# of two threads that do so at the same time one finds nothing, and takes that for a status of its own.
_children = threading.Lock()


def in_new_process(job: Job, unwanted: threading.Event | None = None) -> Ending:
    """Run ``job`` in a process of its own, with the environment of this one, and return how it ended.

    The process ends when this one does, so that a worker that is killed leaves no cell behind.

    Args:
        job: The cell.
        unwanted: Ends the cell as soon as it has started, if set by then; starting may take seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(job, dict(os.environ), sender), daemon=False)
    with receiver:
        try:
            with sender, _children:
                process.start()
        except (EOFError, OSError) as error:  # what it is forked from was killed
            time.sleep(_BURIAL_SECONDS)
            return Ending(
                f"The process of the cell could not be started ({sentence(error)}), perhaps for want of "
                "memory: run the grid again, with fewer --workers if need be."
            )
        if unwanted is not None and unwanted.is_set():
            process.terminate()
        try:
            ending: Ending = receiver.recv()
        except EOFError:  # the process died without a word
            with _children:
                process.join()
            return Ending(f"The process of the cell ended with exit code {process.exitcode}; see {job.log}.")
    with _children:
        process.join()
    return ending


def in_this_process(job: Job) -> Ending:
    """Run ``job`` here, its output at the end of its log, and return how it ended.

    Nothing is raised but SystemExit, by which submitit ends a job that it has queued again.
    """
    from cl_bench.run.run import RunFailed, quiet, run  # seconds, in a process that only hands cells on

    job.folder.mkdir(parents=True, exist_ok=True)
    # Another process may be running the cell, and writing there.
    with job.log.open("a", encoding="utf-8", buffering=1) as log:
        log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} process {os.getpid()} on {platform.node()}\n")
        outputs = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = log
        try:
            with quiet():
                run(job.cell.configuration(), wait=print if job.patient else None)
            return Ending()
        except Held as error:
            return Ending(str(error), held=True)
        except (Exception, KeyboardInterrupt) as error:  # whatever it is, the grid goes on and says it
            traceback.print_exception(error)
            words = str(error) if isinstance(error, RunFailed) else sentence(error)
            return Ending(f"{words} The traceback is in {job.log}")
        finally:
            sys.stdout, sys.stderr = outputs


def _answer(job: Job, environment: Mapping[str, str], sender: Connection) -> None:
    os.environ.clear()
    os.environ.update(environment)
    # Ctrl-C in a terminal reaches every process; whoever supervises this one hears it, and asks it to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sender.send(in_this_process(job))


def _end_with_parent() -> None:
    """Wait for the end of the parent process, then ask this one to end, and insist."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_FAREWELL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
