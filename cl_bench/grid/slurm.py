"""The engine on SLURM: every cell is a job, submitted through submitit."""

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
from cl_bench.grid.engine import Answer, Engine
from cl_bench.grid.work import Ending, Job, in_this_process

_LOOK_SECONDS = 1.0
_MINUTES = 24 * 60
_MINUTES_OF_A_QUESTION = 5
_REQUEUES = 100


class SlurmEngine(Engine):
    """Cells as SLURM jobs; one that runs out of time, or is preempted, is queued again.

    Args:
        results: Folder of all results; what submitit keeps of its jobs goes into ``.slurm`` below it.
        workers: Cells at a time; None leaves it to SLURM.
        gpus_per_cell: Whole GPUs of a cell; None is none.
        parameters: Parameters of sbatch, such as partition and time (in minutes, a day unless given).
        cluster: ``local`` has submitit start the jobs as processes of this machine, as its own tests do.

    Raises:
        ValueError: If there is no SLURM here, or a parameter cannot be used.
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
                "There is no SLURM on this machine (no srun): log in to one that has it, or choose another "
                "--engine."
            ) from error
        parallel = {} if workers is None else {"slurm_array_parallelism": workers}
        named = {f"slurm_{name}": value for name, value in parameters.items() if name != "time"}
        always = {"name": "cl-bench", "timeout_min": self._minutes, "gpus_per_node": int(gpus) or None}
        try:
            self._executor.update_parameters(**always | parallel | named)
        except (NameError, ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"--slurm cannot be used as it is: {str(error).splitlines()[0]}") from error

    def close(self) -> None:
        """Cancel the jobs that are not done."""
        for submitted in self._submitted:
            if not submitted.done():
                submitted.cancel(check=False)

    def ask(self, question: Callable[[], Answer]) -> list[Answer]:
        """Return what ``question`` answers in a short job; it waits in the queue as any other."""
        minutes = min(_MINUTES_OF_A_QUESTION, self._minutes)
        self._executor.update_parameters(timeout_min=minutes, cpus_per_task=1)
        with _refusing():
            job = self._executor.submit(question)
        self._submitted.append(job)
        self._executor.update_parameters(timeout_min=self._minutes)
        try:
            return [job.result()]
        except UncompletedJobError as error:
            raise ValueError(f"SLURM could not run the first job: {_last_line(error)}") from error

    def run(
        self,
        jobs: Sequence[Job],
        began: Callable[[Job], None],
        ended: Callable[[Job, Ending], None],
    ) -> None:
        """Run ``jobs`` as job arrays, one for each number of threads."""
        threads = attrgetter("threads")
        running: list[tuple[submitit.Job[Ending], Job]] = []
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
                    began(job)
                if done:
                    running.remove((submitted, job))
                    ended(job, _ending(submitted))
            time.sleep(_LOOK_SECONDS)


class _InJob(Checkpointable):
    """Runs a cell in the process of its job; submitit queues it again when SLURM stops it early."""

    def __call__(self, job: Job) -> Ending:
        """Return how it ended."""
        # The signal by which submitit queues the job again is another; SLURM may send this one before it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return in_this_process(job)


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except (FailedJobError, FailedSubmissionError) as error:
        raise ValueError(f"SLURM did not take the jobs: {sentence(error)}") from error


def _ending(submitted: submitit.Job[Ending]) -> Ending:
    try:
        return submitted.result()
    except FailedJobError as error:
        return Ending(f"The job of the cell failed: {_last_line(error)}")
    except UncompletedJobError:
        return Ending(f"The job of the cell ended without a word; see {submitted.paths.stderr}.")


def _last_line(error: Exception) -> str:
    return next((line for line in reversed(str(error).splitlines()) if line.strip(" -")), "no reason given")
