"""Tunes in processes that are killed. A script, so that it may fork.

python tests/tune/killed.py FOLDER DATASET reads a list of [name, trials, moment] from standard input and
tunes two methods into FOLDER/NAME; the moment is the number of the write of a result at which the process is
killed, or null. It prints the exit status of each.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from cl_bench.grid.engine import Engine
from cl_bench.grid.work import Job, Outcome, in_this_process
from cl_bench.results.result import Result
from cl_bench.tune.command import tune
from cl_bench.tune.space import space_of
from cl_bench.tune.study import Plan

Value = TypeVar("Value")


class Here(Engine):
    """Runs cells in this process, so that a test sees inside them; it remembers them."""

    def __init__(self, results: Path) -> None:
        self.ran: list[Job] = []

    def close(self) -> None:
        pass

    def call(self, function: Callable[[], Value]) -> list[Value]:
        return [function()]

    def run(
        self,
        jobs: Sequence[Job],
        started: Callable[[Job], None],
        ended: Callable[[Job, Outcome], None],
    ) -> None:
        for job in jobs:
            self.ran.append(job)
            started(job)
            ended(job, in_this_process(job))


RATE: dict[str, Any] = {"low": 1e-4, "high": 1.0, "log": True}
PROBE: dict[str, Any] = {"head_lr": RATE, "head_start": {"choices": ["random", "means"]}}
SPACES: dict[str, dict[str, dict[str, Any]]] = {
    "toy": {"linear_probe": PROBE, "ncm": {"similarity": {"choices": ["euclidean", "cosine"]}}},
    "characters": {"linear_probe": PROBE, "lora": {"optimizer.lr": RATE, "head_lr": RATE}},
}


def plans(dataset: str, results: Path, trials: int) -> list[Plan]:
    return [
        Plan(
            name,
            dataset,
            space_of(space),
            unit="trials",
            budget=trials,
            on="first:3",
            results=results,
            sensitivity=trials > 5,  # two more cells
        )
        for name, space in SPACES[dataset].items()
    ]


def tuned(dataset: str, results: Path, trials: int, moment: int | None) -> None:
    write, writes = Result.write, 0

    def counted(*args: Any, **kwargs: Any) -> Path:
        nonlocal writes
        writes += 1
        if writes == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*args, **kwargs)

    Result.write = counted  # type: ignore[method-assign]
    tune(plans(dataset, results, trials), Here, Console(quiet=True))
    (results / "writes").write_text(str(writes))


def main() -> None:
    folder, dataset = Path(sys.argv[1]), sys.argv[2]
    statuses = []
    for name, trials, moment in json.load(sys.stdin):
        child = os.fork()
        if child == 0:
            try:
                tuned(dataset, folder / name, trials, moment)
            finally:
                os._exit(0)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(statuses))


if __name__ == "__main__":
    main()
