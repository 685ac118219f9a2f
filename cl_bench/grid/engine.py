"""What an engine is: the one thing that differs between a grid on this machine, on Ray and on SLURM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self, TypeVar

from cl_bench.grid.work import Ending, Job

Name = Literal["local", "ray", "slurm"]
Answer = TypeVar("Answer")


class Engine(ABC):
    """Runs cells somewhere, between entering and leaving it."""

    def __enter__(self) -> Self:
        """Connect to where cells run."""
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs, and disconnect."""
        self.close()

    @abstractmethod
    def close(self) -> None:
        """End what still runs, and disconnect."""

    @abstractmethod
    def ask(self, question: Callable[[], Answer]) -> list[Answer]:
        """Return what ``question`` answers where cells run, on every machine that is known beforehand."""

    @abstractmethod
    def run(
        self,
        jobs: Sequence[Job],
        began: Callable[[Job], None],
        ended: Callable[[Job, Ending], None],
    ) -> None:
        """Run ``jobs``; one that fails does not stop the rest.

        Args:
            jobs: What to run, first ones first.
            began: Called when a job starts, from any thread.
            ended: Called when it has ended, in the calling thread.
        """


def engine(
    name: Name,
    results: Path,
    *,
    workers: int | None = None,
    address: str | None = None,
    gpus_per_cell: float | None = None,
    slurm: Mapping[str, str | int] | None = None,
) -> Engine:
    """Return the engine called ``name``.

    Args:
        name: local, ray or slurm.
        results: Folder of all results.
        workers: Cells at a time; None is as many as there is room for.
        address: ray: HOST:PORT of the cluster; None is the one that runs on this machine.
        gpus_per_cell: ray and slurm: GPUs of a cell; a fraction shares one, on Ray.
        slurm: slurm: parameters of sbatch, such as partition and time.

    Raises:
        ValueError: If a setting is of no use to that engine, or its extra is not installed.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"A grid cannot run with {workers} workers: give at least one.")
    if gpus_per_cell is not None and not 0 <= gpus_per_cell:
        raise ValueError(f"A cell cannot have {gpus_per_cell:g} GPUs: give 0 or more, such as 0.5.")
    for option, given, engines in (
        ("--address", address, ("ray",)),
        ("--gpus-per-cell", gpus_per_cell, ("ray", "slurm")),
        ("--slurm", slurm, ("slurm",)),
    ):
        if given is not None and name not in engines:
            raise ValueError(f"{option} says nothing to the engine {name}: add --engine {engines[0]}.")
    try:
        if name == "ray":
            from cl_bench.grid.ray import RayEngine

            return RayEngine(address, workers, gpus_per_cell)
        if name == "slurm":
            from cl_bench.grid.slurm import SlurmEngine

            return SlurmEngine(results, workers, gpus_per_cell, slurm or {})
    except ModuleNotFoundError as error:
        if error.name not in ("ray", "submitit"):
            raise
        raise ValueError(f"{error.name} is not installed: run pip install 'cl-bench[{name}]'.") from error
    from cl_bench.grid.local import LocalEngine

    return LocalEngine(workers)
