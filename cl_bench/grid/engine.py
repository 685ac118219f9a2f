"""The contract of an engine, which runs the cells of a grid: on this machine, on Ray or on SLURM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self, TypeVar

from cl_bench.grid.work import Job, Outcome

Value = TypeVar("Value")


class Engine(ABC):
    """Runs cells while its context is entered."""

    def __enter__(self) -> Self:
        """Connect to the machines that run cells."""
        return self

    def __exit__(self, *_: object) -> None:
        """Terminate unfinished cells, and disconnect."""
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Terminate unfinished cells, and disconnect."""

    @abstractmethod
    def call(self, function: Callable[[], Value]) -> list[Value]:
        """Return what ``function`` returns on each machine that is known to run cells, at least on one."""

    @abstractmethod
    def run(
        self,
        jobs: Sequence[Job],
        started: Callable[[Job], None],
        ended: Callable[[Job, Outcome], None],
    ) -> None:
        """Run ``jobs``; if one fails, the others still run.

        Args:
            jobs: What to run, in this order.
            started: Called when a job starts, from any thread.
            ended: Called when a job has ended, from the thread of the caller.
        """
