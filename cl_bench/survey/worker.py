"""A process that works on one row after another; it is replaced when it dies, hangs or fails.

An error of CUDA leaves its process without a usable device, and a kernel can hang: neither ends a survey.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cl_bench.bench.options import SILENT
from cl_bench.survey.plan import Task

# cuBLAS repeats its sums only with this; a process reads it once. On an H100 and H200 it is torch's default.
_REPEATING = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

Found = dict[str, Any]
"""What a row found: figures by name, ``reasons`` for those that are null, and what ``failed``."""


class Worker:
    """A process of its own, started with the first task.

    Args:
        folder: Where rows share what they generate.
        threads: Threads of the CPU.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self._arguments = folder, threads
        self._process: Any = None
        self._connection: Connection

    def found(self, task: Task, seconds: float) -> Found | None:
        """Return what ``task`` finds; after ``seconds``, kill the process and return None."""
        if self._process is None:
            self._start()
        began = time.monotonic()
        try:
            self._connection.send(task)
            if not self._connection.poll(seconds):
                self.close()
                return None
            found: Found = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            status = self._process.exitcode
            found = {"failed": [f"The process ended with status {status}."]}
        found["seconds"] = round(time.monotonic() - began, 2)
        if found["failed"]:
            self.close()
        return found

    def close(self) -> None:
        """Kill the process; the next task starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, *self._arguments))
        self._process.start()
        other.close()


def made(task: Task, folder: Path) -> Found:
    """Return what ``task`` finds, in this process."""
    from cl_bench.errors import sentence
    from cl_bench.run.run import quiet
    from cl_bench.survey import agreement, speed

    kinds: dict[str, Callable[..., Found]] = {
        "setup": speed.setup,
        "check": agreement.check,
        "graphs": agreement.graphs,
        "steps": speed.steps,
        "stream": speed.stream,
        "loading": speed.loading,
    }
    shared = {"folder": folder} if task.kind in ("stream", "loading") else {}
    try:
        with quiet():
            return {"failed": [], **kinds[task.kind](**task.arguments, **shared)}
    except Exception as error:  # whatever a row raises belongs to that row
        return {"failed": [sentence(error)], "traceback": traceback.format_exc()}


def _end_with_parent() -> None:
    """End this process when its parent is gone: a row would keep the device for minutes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _serve(connection: Connection, folder: Path, threads: int) -> None:
    """Make rows until the other end of ``connection`` closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process kills this one after Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update({**SILENT, **os.environ, **_REPEATING})
    import torch

    torch.set_num_threads(threads)
    while True:
        try:
            task: Task = connection.recv()
        except EOFError:
            return
        connection.send(made(task, folder))
