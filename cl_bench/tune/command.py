"""The verb ``tune``: studies side by side, their trials as cells of an engine, and their records."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from cl_bench.grid.command import run_entries, working
from cl_bench.grid.engine import Engine
from cl_bench.results.tuning import Tuning
from cl_bench.run.configuration import Configuration
from cl_bench.run.tracking import how_to_read
from cl_bench.tune.study import TRIALS_FOLDER, Plan, Study, studies
from cl_bench.tune.trials import Trial


def tune(plans: Sequence[Plan], engine: Callable[[Path], Engine], console: Console) -> dict[str, Tuning]:
    """Run the studies of ``plans`` until their budgets are spent, and return their records by name.

    Generations of all studies run together, and trials that have ended are read. A study ends without a
    record if one of its trials fails, or none has a finite loss; the others continue. Records are also
    written, and the best is printed.

    Args:
        plans: What to tune; all with one folder of results.
        engine: Returns the engine, given the folder of all results.
        console: Where progress is printed.

    Raises:
        ValueError: If a plan or the engine cannot be used.
    """
    running = studies(plans)
    results = plans[0].results
    records: dict[str, Tuning] = {}
    tried: dict[Path, Configuration] = {}
    with working(engine(results), results / TRIALS_FOLDER) as worker:
        while running:
            asked = {study: trials for study in running if (trials := study.ask())}
            for one in itertools.chain.from_iterable(asked.values()):
                tried[one.configuration.folder] = one.configuration
            if waiting := _unfinished(asked):
                run_entries(waiting, worker, console)
            for study in running.copy():
                if study in asked and all(trial.score() for trial in asked[study]):
                    study.tell()
                    continue
                running.remove(study)
                if study in asked:
                    remedy = "a trial failed. Run the same command again to repeat it."
                elif (record := study.tuning()) is None:
                    remedy = "no trial was completed with a finite loss. Narrow its space."
                else:
                    records[study.plan.name] = record
                    record.write(study.plan.record)
                    remedy = closing(record, study.plan.record)
                console.print(f"{study.plan.strategy} on {study.plan.dataset}: {remedy}", markup=False)
    for line in how_to_read(list(tried.values())):
        console.print(line, markup=False)
    return records


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
    chosen = ", ".join(f"{key} {value}" for key, value in record.chosen.items())
    second = "" if record.runner_up is None else f", runner-up {record.scores[record.runner_up]:.2f}"
    spent = ", ".join(f"{value:g} {unit}" for unit, value in record.spent.items())
    score = f"{record.metric} {record.scores[record.best]:.2f}"
    return f"{score} with {chosen or 'its settings as they are'}{second}; {spent}\n  {path}"
