"""The local engine: one process for each cell, forked from a parent that has imported the stack already."""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path

from cl_bench.errors import sentence
from cl_bench.grid.cells import Cell
from cl_bench.run import RunFailed, quiet, run

LOG_NAME = "log.txt"

# Importing the stack takes seconds; a cell forked from this parent starts in milliseconds.
_PRELOAD = ["cl_bench.run", "cl_bench.grid.local", "avalanche.benchmarks", "sklearn.datasets", "timm"]


def run_local(
    cells: Sequence[tuple[Cell, Path]],
    workers: int,
    began: Callable[[Cell], None],
    ended: Callable[[Cell, str | None], None],
) -> None:
    """Run ``cells`` in processes of their own, ``workers`` at a time; one that fails does not stop the rest.

    Args:
        cells: Each with its folder, where its output goes to ``log.txt``.
        workers: Cells at a time.
        began: Called from a worker thread when a cell starts.
        ended: Called in the calling thread with the error of a cell in one sentence, or None.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)

    def supervise(cell: Cell, folder: Path) -> str | None:
        began(cell)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(cell, folder, sender), daemon=False)
        process.start()
        sender.close()
        try:
            error: str | None = receiver.recv()
        except EOFError:  # the process died without a word
            process.join()
            return (
                f"The process of the cell ended with exit code {process.exitcode}; see {folder / LOG_NAME}."
            )
        process.join()
        return error

    with ThreadPoolExecutor(workers) as pool:
        futures: dict[Future[str | None], Cell] = {pool.submit(supervise, *pair): pair[0] for pair in cells}
        try:
            for future in as_completed(futures):
                ended(futures[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _work(cell: Cell, folder: Path, sender: Connection) -> None:
    """Run one cell in this process and send its error, or None."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG_NAME).open("w", encoding="utf-8", buffering=1) as log:
        sys.stdout = sys.stderr = log
        try:
            with quiet():
                run(cell.configuration())
            sender.send(None)
        except BaseException as error:  # whatever it is, the grid goes on and says it
            traceback.print_exception(error)
            words = str(error) if isinstance(error, RunFailed) else sentence(error)
            sender.send(f"{words} The traceback is in {folder / LOG_NAME}")
        finally:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
