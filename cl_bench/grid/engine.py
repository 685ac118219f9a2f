"""What an engine is: the one thing that differs between a grid on this machine, on Ray and on SLURM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self, TypeVar

from cl_bench.grid.work import Ending, Job

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
