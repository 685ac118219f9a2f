"""The verb ``grid``: what is to run, what runs, and what became of it."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from cl_bench.configuration import Configuration
from cl_bench.grid.cells import Cell, read_grid
from cl_bench.grid.local import run_local
from cl_bench.results import FILE_NAME, read
from cl_bench.run import finished


@dataclass(frozen=True, eq=False)
class Entry:
    """A cell of a grid with what is known of it.

    Attributes:
        cell: The words of its command.
        configuration: The same, resolved.
        done: Its finished result file, if there is one.
    """

    cell: Cell
    configuration: Configuration
    done: Path | None

    @property
    def title(self) -> str:
        """Strategy, benchmark, order and seed in a few words."""
        folder = self.configuration.folder
        return f"{folder.parent.name} on {self.configuration.benchmark}, {folder.name}"


def run_grid(name: str, results: Path | None, workers: int | None, *, dry_run: bool) -> bool:
    """Run the unfinished cells of grid ``name`` and return whether every cell is done.

    Args:
        name: Config stem or path.
        results: Folder of all results, if not the grid's own.
        workers: Cells at a time; None fills the CPUs with the threads of a cell.
        dry_run: List the cells and run nothing.

    Raises:
        ValueError: If the grid or any of its cells is not valid; nothing has run then.
    """
    console = Console(highlight=False, soft_wrap=True)
    grid = read_grid(name, results)
    entries = _entries([*grid.cells()])
    waiting = [entry for entry in entries if entry.done is None]
    console.print(
        f"{len(entries)} cells, {len(entries) - len(waiting)} done, results in {grid.results}", markup=False
    )
    if dry_run:
        console.print(_listing(entries))
        return not waiting
    if not waiting:
        return True
    errors = _run(waiting, workers or _default_workers(waiting), console)
    for entry, error in errors:
        console.print(f"failed: {entry.title}\n  {error}\n  {entry.cell.command}", markup=False)
    console.print(f"{len(entries) - len(errors)} of {len(entries)} cells done", markup=False)
    return not errors


def _entries(cells: list[Cell]) -> list[Entry]:
    entries = [Entry(cell, configuration := cell.configuration(), finished(configuration)) for cell in cells]
    hashes = Counter(entry.configuration.hash for entry in entries)
    for entry in entries:
        if hashes[entry.configuration.hash] > 1:
            raise ValueError(f"The grid holds the same cell twice: {entry.cell.command}. Remove one of them.")
    return entries


def _default_workers(entries: list[Entry]) -> int:
    threads: int = max(entry.configuration.namespace.threads for entry in entries)
    return max(1, (os.cpu_count() or 1) // threads)


def _listing(entries: list[Entry]) -> Table:
    table = Table(box=None)
    for heading in ("cell", "state", "command"):
        table.add_column(heading, overflow="fold")
    for entry in entries:
        table.add_row(entry.configuration.hash, "done" if entry.done else "to run", entry.cell.command)
    return table


def _run(entries: list[Entry], workers: int, console: Console) -> list[tuple[Entry, str]]:
    by_cell = {entry.cell: entry for entry in entries}
    errors: list[tuple[Entry, str]] = []
    display = _Display(len(entries), console)

    def ended(cell: Cell, error: str | None) -> None:
        display.ended(by_cell[cell], error)
        if error is not None:
            errors.append((by_cell[cell], error))

    with display.live:
        run_local(
            [(entry.cell, entry.configuration.folder) for entry in entries],
            workers,
            lambda cell: display.began(by_cell[cell]),
            ended,
        )
    return errors


class _Display:
    """A bar over the cells, and a line for each cell that runs, read from its result file."""

    def __init__(self, cells: int, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._cells = self._progress.add_task("cells", total=cells)
        self._running: dict[Entry, TaskID] = {}
        self.live = Live(get_renderable=self._render, console=console, refresh_per_second=2, transient=True)

    def began(self, entry: Entry) -> None:
        length = entry.configuration.datamodule.stream_length
        self._running[entry] = self._progress.add_task(f"  {entry.title}", total=length)

    def ended(self, entry: Entry, error: str | None) -> None:
        self._progress.remove_task(self._running.pop(entry))
        self._progress.advance(self._cells)
        outcome = "failed" if error else _outcome(entry)
        self.live.console.print(f"  {entry.title}: {outcome}", markup=False)

    def _render(self) -> Progress:
        for entry, task in list(self._running.items()):
            path = entry.configuration.folder / FILE_NAME
            if path.exists():
                self._progress.update(task, completed=len(read(path).rows))
        return self._progress


def _outcome(entry: Entry) -> str:
    result = read(entry.configuration.folder / FILE_NAME)
    return f"ACC {result.metrics()['acc/sample']:.2f} % in {sum(result.seconds().values()):.0f} s"
