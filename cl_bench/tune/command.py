"""The verb ``tune``: studies side by side, their trials as cells of an engine, and their records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from cl_bench.grid.command import run_entries, working
from cl_bench.grid.engine import Engine
from cl_bench.results.tuning import Tuning
from cl_bench.tune.study import TRIALS_FOLDER, Plan, Study, studies
from cl_bench.tune.trials import Trial


def tune(plans: Sequence[Plan], engine: Callable[[Path], Engine], console: Console) -> bool:
    """Run the studies of ``plans`` until all budgets are spent, write their records, and print the best.

    Return whether no trial failed. Generations of all studies run together; trials that have ended are read.

    Args:
        plans: What to tune; all with one folder of results.
        engine: Returns the engine, given the folder of all results.
        console: Where progress is printed.

    Raises:
        ValueError: If a plan or the engine cannot be used.
    """
    opened = studies(plans)
    results = plans[0].results
    with working(engine(results), results / TRIALS_FOLDER) as working_engine:
        while asked := {study: trials for study in opened if (trials := study.ask())}:
            waiting = _unfinished(asked)
            if waiting and run_entries(waiting, working_engine, console):
                console.print("Run the same command again to repeat the trials that failed.", markup=False)
                return False
            for study in asked:
                study.tell()
    for study in opened:
        record = study.tuning()
        record.write(study.plan.record)
        console.print(closing(record, study.plan.record), markup=False)
    return True


def _unfinished(asked: dict[Study, list[Trial]]) -> list[Trial]:
    """Return the trials that have not ended, each cell once."""
    cells = {
        trial.configuration.hash: trial
        for trials in asked.values()
        for trial in trials
        if trial.score() is None
    }
    return list(cells.values())


def closing(record: Tuning, path: Path) -> str:
    """Return what a study found, in a few lines."""
    chosen = ", ".join(f"{key} {value}" for key, value in record.settings_of(record.best).items())
    second = "" if record.runner_up is None else f", runner-up {record.scores[record.runner_up]:.2f}"
    spent = ", ".join(f"{value:g} {unit}" for unit, value in record.spent.items())
    score = f"{record.metric} {record.scores[record.best]:.2f}"
    return f"{record.strategy} on {record.dataset}: {score} with {chosen}{second}; {spent}\n  {path}"
