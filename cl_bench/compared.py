"""Strategies compared from Python: the cells of a grid, their results, tables and pictures.

A cell from here and one from the command line are the same cell, in the same folder: whichever comes first
runs it, and an interrupted one resumes. A comparison can begin in a notebook and be finished on a cluster.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from rich.console import Console

from cl_bench.errors import suggestion
from cl_bench.grid.cells import Grid
from cl_bench.grid.command import Entry, known, run_waiting
from cl_bench.grid.engine import Engine
from cl_bench.report.command import METRICS, with_confusions
from cl_bench.report.comparison import Comparison, comparisons
from cl_bench.report.comparison import Entry as Row
from cl_bench.report.pictures import PICTURES
from cl_bench.report.pictures.figures import DEFAULT, Picture, Style
from cl_bench.report.tables import compared, protocol_differences, tables
from cl_bench.report.text import means
from cl_bench.results.metrics import Matrix, accuracy_matrix
from cl_bench.results.result import Result, read
from cl_bench.run.console import RunConsole
from cl_bench.run.run import RunFailed, finished, quiet, run

Kind = Literal["curves", "matrix", "cost", "confusion"]


@dataclass(frozen=True, repr=False)
class Compared:
    """The results of a comparison; printed, it is a table of means.

    Attributes:
        results: One for each cell, in the order of the cells.
        folder: Folder of all results.
    """

    results: Sequence[Result]
    folder: Path

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The results, gathered by protocol; usually there is one."""
        compared = comparisons(self.results)
        with_confusions(compared, self.folder)
        return compared

    @property
    def comparison(self) -> Comparison:
        """All results under their one protocol.

        Raises:
            ValueError: If their protocols differ.
        """
        if len(self.comparisons) > 1:
            raise ValueError(" ".join(protocol_differences(self.comparisons)))
        return self.comparisons[0]

    def accuracy_matrix(self, strategy: str) -> Matrix:
        """Return the accuracy in percent (T, T) on experience j after experience i, the mean over all runs.

        Args:
            strategy: Its name, as the table has it.

        Raises:
            ValueError: If the table has no such name.
        """
        matrices = [accuracy_matrix(run.counts("correct"), run.totals) for run in self._row(strategy).runs]
        return np.asarray(np.mean(matrices, axis=0))

    def to_frame(self) -> pd.DataFrame:
        """Return a table with a row for each run: strategy, seed, class order, cell, metrics and costs."""
        return pd.DataFrame(
            {"strategy": row.label, "seed": run.seed, "order": run.order, "cell": run.cell}
            | run.metrics()
            | run.spending()
            for comparison in self.comparisons
            for row in comparison.entries
            for run in row.runs
        )

    def plot(self, kind: Kind = "curves", style: Style = DEFAULT) -> Picture:
        """Return a picture, which a notebook shows, and whose ``savefig`` writes PDF, SVG or PNG.

        Args:
            kind: ``curves`` of accuracy, accuracy ``matrix``, accuracy against ``cost``, or ``confusion`` of
                experiences, of cells that were run with ``keep="predictions"``.
            style: Width and font.

        Raises:
            ValueError: If there is no such picture, or the protocols of the results differ.
        """
        if kind not in PICTURES:
            raise ValueError(f"There is no picture {kind!r}. {suggestion(kind, PICTURES)}")
        picture = PICTURES[kind](self.comparison, style)
        if picture is None:
            needed = 'keep="predictions"' if kind == "confusion" else "cells that have measured their seconds"
            raise ValueError(f"These results have no {kind} to draw: it needs {needed}.")
        return picture

    def __str__(self) -> str:
        """Return the means of the report, in Markdown, below what was compared."""
        return "\n\n".join(
            "\n".join([*map(compared, table.comparisons), "", means(table)])
            for table in tables(self.comparisons, METRICS)
        )

    __repr__ = _repr_markdown_ = __str__

    def _row(self, strategy: str) -> Row:
        rows = {row.label: row for row in self.comparison.entries}
        if strategy not in rows:
            raise ValueError(f"There is no strategy {strategy!r} here. {suggestion(strategy, rows)}")
        return rows[strategy]


def compare(
    strategies: Sequence[str],
    dataset: str,
    *,
    seeds: Sequence[int] = (1,),
    orders: Sequence[str] = ("identity",),
    settings: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    results: str | Path = "results",
    engine: Engine | None = None,
    progress: bool = False,
    **options: Any,
) -> Compared:
    """Run what is not done of strategies × seeds × class orders on a dataset, and return all results.

    Args:
        strategies: Config stems or paths.
        dataset: Config stem or path.
        seeds: Seeds.
        orders: Class orders.
        settings: For a strategy, names of settings with their options, as in
            ``{"lora": {"small": {"rank": 2}}}``.
        results: Folder of all results.
        engine: Where cells run, as in ``LocalEngine(workers=4)``; None for this process.
        progress: Whether to print a line for every finished experience, if cells run in this process.
        options: Options of every cell, as for ``cl-bench run``; one with a dot as
            ``**{"optimizer.lr": 0.01}``.

    Raises:
        ValueError: If a name or an option is not valid. No cell has run then.
        RunFailed: If cells failed, after all others have run.
    """
    own = {name: {key: dict(one) for key, one in named.items()} for name, named in (settings or {}).items()}
    grid = Grid(
        strategies=list(strategies),
        datasets=[dataset],
        settings=own,
        orders=list(orders),
        seeds=list(seeds),
        results=str(results),
        common={key: str(value) if isinstance(value, Path) else value for key, value in options.items()},
    )
    with quiet():
        entries = known([*grid.cells()])
        failed = _run_here(entries, progress) if engine is None else _run_there(entries, engine)
        if failed:
            raise RunFailed(f"{failed}\nRepeat the call once that is mended: what is done is kept.")
        paths = [finished(entry.configuration) for entry in entries]
        return Compared([read(path) for path in paths if path is not None], Path(results))


def _run_here(entries: Sequence[Entry], progress: bool) -> str:
    """Run in this process what is not done, and return what failed, in words."""
    console = Console(quiet=not progress, highlight=False)
    failed = []
    for entry in entries:
        if entry.done is None:
            console.print(entry.title, markup=False)
            try:
                run(entry.configuration, [RunConsole(console)] if progress else [], wait=console.print)
            except RunFailed as error:
                failed.append(f"{entry.title}: {error}")
    return "\n".join(failed)


def _run_there(entries: Sequence[Entry], engine: Engine) -> str:
    """Run on ``engine`` what is not done, and return what failed, in words."""
    printed = io.StringIO()
    done = run_waiting(entries, engine, Console(file=printed, highlight=False, soft_wrap=True))
    return "" if done else printed.getvalue().strip()
