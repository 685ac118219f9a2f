"""The local engine: cells on this machine, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

import torch

from cl_bench.grid.engine import Answer, Engine
from cl_bench.grid.work import Ending, Job, in_new_process


class LocalEngine(Engine):
    """Cells on this machine.

    Args:
        workers: Cells at a time; None is one where they would share an accelerator, and else fills the CPUs
            with the threads of a cell.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers

    def close(self) -> None:
        """Leave nothing: the cells have ended with :meth:`run`."""

    def ask(self, question: Callable[[], Answer]) -> list[Answer]:
        """Return what ``question`` answers here."""
        return [question()]

    def run(
        self,
        jobs: Sequence[Job],
        began: Callable[[Job], None],
        ended: Callable[[Job, Ending], None],
    ) -> None:
        """Run ``jobs``, some at a time."""
        unwanted = threading.Event()

        def supervise(job: Job) -> Ending:
            began(job)
            return in_new_process(job, unwanted)

        with ThreadPoolExecutor(self._workers or _room(jobs)) as pool:
            try:
                futures: dict[Future[Ending], Job] = {pool.submit(supervise, job): job for job in jobs}
                for future in as_completed(futures):
                    ended(futures[future], future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                unwanted.set()  # first, for a cell that is being started is nobody's child yet
                _end_cells()
                raise


def _end_cells() -> None:
    for process in multiprocessing.active_children():
        process.terminate()


def _room(jobs: Sequence[Job]) -> int:
    if torch.cuda.is_available():
        return 1
    return max(1, len(os.sched_getaffinity(0)) // max(job.threads for job in jobs))
