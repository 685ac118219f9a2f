"""What every engine does with a single cell, on any machine."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

from cl_bench.errors import sentence
from cl_bench.grid.cells import Cell
from cl_bench.processes.streams import Unfailing
from cl_bench.run.claim import Held

if TYPE_CHECKING:  # slow to import
    from lightning.pytorch import Callback

LOG_NAME = "log.txt"

# Importing these takes seconds; a cell that is forked from a process with the imports starts in milliseconds.
_PRELOAD = ["cl_bench.run.run", "cl_bench.grid.work", "cl_bench.data.avalanche", "sklearn.datasets", "timm"]
_TERMINATION_SECONDS = 30.0
_REAPING_SECONDS = 1.0  # a killed forkserver is replaced after it has left the process table


@dataclass(frozen=True)
class Job:
    """A cell to run.

    Attributes:
        cell: The words of its command.
        folder: Its folder; its output is appended to ``log.txt`` there.
        threads: Number of CPU threads that it uses.
        waits: Whether it waits if another process runs the same cell.
        callbacks: Each returns a callback of the run; they can be pickled and hashed.
    """

    cell: Cell
    folder: Path
    threads: int
    waits: bool = False
    callbacks: tuple[Callable[[], Callback], ...] = ()

    @property
    def log(self) -> Path:
        """File of its output."""
        return self.folder / LOG_NAME


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        error: What went wrong, in one sentence; None if nothing did.
        held: Whether the cell was not run because another process runs it.
    """

    error: str | None = None
    held: bool = False


# Starting or joining a process reads the exit status of every child that has ended, and a status can be read
# only once: if two threads do so at the same time, one finds nothing and reports a wrong status.
_children = threading.Lock()


def begin_imports() -> None:
    """Let the process from which cells are forked import what they need, while this one goes on."""
    _context()
    multiprocessing.forkserver.ensure_running()


def in_new_process(job: Job, stopped: threading.Event | None = None) -> Outcome:
    """Run ``job`` in a new process with the environment of this one, and return how it ended.

    The process ends when this one ends, so a killed worker leaves no cell behind.

    Args:
        job: The cell.
        stopped: Terminates the cell if it is set while the process starts, which may take seconds.
    """
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_outcome, args=(job, dict(os.environ), sender), daemon=False)
    with receiver:
        try:
            with sender, _children:
                process.start()
        except (EOFError, OSError) as error:  # the forkserver was killed
            time.sleep(_REAPING_SECONDS)
            return Outcome(
                f"The process of the cell could not be started ({sentence(error)}), perhaps because "
                "memory ran out: run the grid again, with fewer --workers if necessary."
            )
        if stopped is not None and stopped.is_set():
            process.terminate()
        try:
            outcome: Outcome = receiver.recv()
        except EOFError:  # the process was killed
            with _children:
                process.join()
            return Outcome(f"The process of the cell ended with exit code {process.exitcode}; see {job.log}.")
    with _children:
        process.join()
    return outcome


def in_this_process(job: Job) -> Outcome:
    """Run ``job`` here, append its output to its log, and return how it ended.

    Raises:
        SystemExit: If submitit ends the job because it has requeued it.
    """
    from cl_bench.run.run import RunFailed, quiet, run  # slow; processes that only pass cells on do without

    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        # Appended, since another process may be running the cell and writing there.
        file = job.log.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        return Outcome(f"The log of the cell cannot be written: {sentence(error)}")
    with file:
        log = Unfailing(file)
        log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} process {os.getpid()} on {platform.node()}\n")
        outputs = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = log
        try:
            with quiet():
                callbacks = [callback() for callback in job.callbacks]
                run(job.cell.configuration(), callbacks, wait=print if job.waits else None)
            return Outcome()
        except Held as error:
            return Outcome(str(error), held=True)
        except (Exception, KeyboardInterrupt) as error:  # the grid prints any error and continues
            traceback.print_exception(error)
            message = str(error) if isinstance(error, RunFailed) else sentence(error)
            return Outcome(f"{message} The traceback is in {job.log}")
        finally:
            sys.stdout, sys.stderr = outputs


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _send_outcome(job: Job, environment: Mapping[str, str], sender: Connection) -> None:
    os.environ.clear()
    os.environ.update(environment)
    # Ctrl-C in a terminal signals every process; the parent handles it and terminates this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sender.send(in_this_process(job))


def _end_with_parent() -> None:
    """Wait for the end of the parent process, then terminate this one, and kill it if that takes too long."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_TERMINATION_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
