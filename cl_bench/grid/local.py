"""The local engine: cells on this machine, each in its own process."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

import torch

from cl_bench.grid.engine import Engine, Value
from cl_bench.grid.work import Job, Outcome, in_new_process


class LocalEngine(Engine):
    """Cells on this machine.

    Args:
        workers: Cells at a time; None means one if they would share a GPU, and otherwise as many as the CPUs
            have room for, given the threads of a cell.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers

    def close(self) -> None:
        """Do nothing: all cells have ended when :meth:`run` returns."""

    def call(self, function: Callable[[], Value]) -> list[Value]:
        """Return what ``function`` returns here."""
        return [function()]

    def run(
        self,
        jobs: Sequence[Job],
        started: Callable[[Job], None],
        ended: Callable[[Job, Outcome], None],
    ) -> None:
        """Run ``jobs``, several at a time."""
        stopped = threading.Event()

        def supervise(job: Job) -> Outcome:
            started(job)
            return in_new_process(job, stopped)

        with ThreadPoolExecutor(self._workers or _room(jobs)) as pool:
            try:
                futures: dict[Future[Outcome], Job] = {pool.submit(supervise, job): job for job in jobs}
                for future in as_completed(futures):
                    ended(futures[future], future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                stopped.set()  # first: a process that is being started is not yet among the children
                _terminate_cells()
                raise


def _terminate_cells() -> None:
    for process in multiprocessing.active_children():
        process.terminate()


def _room(jobs: Sequence[Job]) -> int:
    if torch.cuda.is_available():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS
    return max(1, cores // max(job.threads for job in jobs))
