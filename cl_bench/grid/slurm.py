"""The engine on SLURM: submitit submits every cell as a job."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError
from submitit.helpers import Checkpointable

from cl_bench.errors import sentence
from cl_bench.grid.engine import Engine, Value
from cl_bench.grid.work import Job, Outcome, in_this_process

_LOOK_SECONDS = 1.0
_MINUTES = 24 * 60
_MINUTES_OF_A_CALL = 5
_REQUEUES = 100


class SlurmEngine(Engine):
    """Cells as SLURM jobs; a job that runs out of time or is preempted is requeued.

    Args:
        results: Folder of all results; submitit keeps the files of its jobs in its subfolder ``.slurm``.
        workers: Cells at a time; None lets SLURM decide.
        gpus_per_cell: GPUs of a cell, a whole number; None means 0.
        parameters: Parameters of sbatch, such as partition and time, in minutes and by default a day.
        cluster: With ``local``, submitit starts the jobs as processes of this machine, as its own tests do.

    Raises:
        ValueError: If SLURM is not installed here, or a parameter cannot be used.
    """

    def __init__(
        self,
        results: Path,
        workers: int | None,
        gpus_per_cell: float | None,
        parameters: Mapping[str, str | int],
        cluster: Literal["slurm", "local"] = "slurm",
    ) -> None:
        gpus = gpus_per_cell or 0
        if gpus != int(gpus):
            raise ValueError(
                f"SLURM gives whole GPUs to a job, not {gpus:g}: choose another --gpus-per-cell."
            )
        self._minutes = parameters.get("time", _MINUTES)
        if not isinstance(self._minutes, int) or self._minutes < 1:
            raise ValueError(f"The time of a job cannot be {self._minutes}: write minutes, as in time=240.")
        self._submitted: list[submitit.Job[Any]] = []
        try:
            self._executor = submitit.AutoExecutor(
                results.resolve() / ".slurm" / "%j", cluster=cluster, slurm_max_num_timeout=_REQUEUES
            )
        except RuntimeError as error:
            raise ValueError(
                "SLURM is not installed on this machine (srun was not found): log in to one that has it, or "
                "choose another --engine."
            ) from error
        parallel = {} if workers is None else {"slurm_array_parallelism": workers}
        named = {f"slurm_{name}": value for name, value in parameters.items() if name != "time"}
        always = {"name": "cl-bench", "timeout_min": self._minutes, "gpus_per_node": int(gpus) or None}
        try:
            self._executor.update_parameters(**always | parallel | named)
        except (NameError, ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"--slurm cannot be used: {str(error).splitlines()[0]}") from error

    def close(self) -> None:
        """Cancel unfinished jobs."""
        for submitted in self._submitted:
            if not submitted.done():
                submitted.cancel(check=False)

    def call(self, function: Callable[[], Value]) -> list[Value]:
        """Return what ``function`` returns in a short job, which waits in the queue like any other."""
        minutes = min(_MINUTES_OF_A_CALL, self._minutes)
        self._executor.update_parameters(timeout_min=minutes, cpus_per_task=1)
        with _refusing():
            job = self._executor.submit(function)
        self._submitted.append(job)
        self._executor.update_parameters(timeout_min=self._minutes)
        try:
            return [job.result()]
        except UncompletedJobError as error:
            raise ValueError(f"SLURM could not run the first job: {_last_line(error)}") from error

    def run(
        self,
        jobs: Sequence[Job],
        started: Callable[[Job], None],
        ended: Callable[[Job, Outcome], None],
    ) -> None:
        """Run ``jobs`` as job arrays, one array for each number of threads."""
        threads = attrgetter("threads")
        running: list[tuple[submitit.Job[Outcome], Job]] = []
        for cpus, group in itertools.groupby(sorted(jobs, key=threads), key=threads):
            alike = list(group)
            self._executor.update_parameters(cpus_per_task=cpus)
            with _refusing():
                array = self._executor.map_array(_InJob(), alike)
            self._submitted += array
            running += zip(array, alike, strict=True)
        queued = {job for _, job in running}
        while running:
            for submitted, job in list(running):
                done = submitted.done()
                if job in queued and (done or submitted.state == "RUNNING"):
                    queued.remove(job)
                    started(job)
                if done:
                    running.remove((submitted, job))
                    ended(job, _outcome(submitted))
            time.sleep(_LOOK_SECONDS)


class _InJob(Checkpointable):
    """Runs a cell in the process of its job; submitit requeues the job if SLURM stops it early."""

    def __call__(self, job: Job) -> Outcome:
        """Return how the cell ended."""
        # SLURM may send SIGTERM before the other signal on which submitit requeues the job.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return in_this_process(job)


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except (FailedJobError, FailedSubmissionError) as error:
        raise ValueError(f"SLURM refused the jobs: {sentence(error)}") from error


def _outcome(submitted: submitit.Job[Outcome]) -> Outcome:
    try:
        return submitted.result()
    except FailedJobError as error:
        return Outcome(f"The job of the cell failed: {_last_line(error)}")
    except UncompletedJobError:
        return Outcome(f"The job of the cell ended without an outcome; see {submitted.paths.stderr}.")


def _last_line(error: Exception) -> str:
    return next((line for line in reversed(str(error).splitlines()) if line.strip(" -")), "no reason given")
