"""The verb ``grid``: what is to run, what runs, and what became of it."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

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
    """Run the unfinished cells of grid ``name`` and return whether none of them failed.

    Args:
        name: Config stem or path.
        results: Folder of all results, if not the grid's own.
        workers: Cells at a time; None fills the CPUs with the threads of a cell.
        dry_run: List the cells and run nothing.

    Raises:
        ValueError: If the grid or any of its cells is not valid; nothing has run then.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"A grid cannot run with {workers} workers: give at least one.")
    console = Console(highlight=False, soft_wrap=True)
    grid = read_grid(name, results)
    entries = known([*grid.cells()])
    waiting = [entry for entry in entries if entry.done is None]
    console.print(
        f"{len(entries)} cells, {len(entries) - len(waiting)} done, results in {grid.results}", markup=False
    )
    if dry_run:
        for entry in entries:
            state = "done  " if entry.done else "to run"
            console.print(f"  {state}  {entry.configuration.hash}  {entry.cell.command}", markup=False)
        return True
    return run_waiting(entries, workers, console)


def run_waiting(entries: Sequence[Entry], workers: int | None, console: Console) -> bool:
    """Run those of ``entries`` that are not done, say what failed, and return whether all are done."""
    waiting = [entry for entry in entries if entry.done is None]
    if not waiting:
        return True
    # A grid that is told to end must end its cells, as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        errors = _run(waiting, workers or _default_workers(waiting), console)
    finally:
        signal.signal(signal.SIGTERM, before)
    for entry, error in errors:
        console.print(f"failed: {entry.title}\n  {error}\n  {entry.cell.command}", markup=False)
    console.print(f"{len(entries) - len(errors)} of {len(entries)} cells done", markup=False)
    return not errors


def known(cells: Sequence[Cell]) -> list[Entry]:
    """Resolve ``cells`` and look for their results.

    Raises:
        ValueError: If a cell is not valid, or is there twice.
    """
    entries = [Entry(cell, configuration := cell.configuration(), finished(configuration)) for cell in cells]
    hashes = Counter(entry.configuration.hash for entry in entries)
    for entry in entries:
        if hashes[entry.configuration.hash] > 1:
            raise ValueError(f"The grid holds the same cell twice: {entry.cell.command}. Remove one of them.")
    return entries


def _default_workers(entries: list[Entry]) -> int:
    """Return one where cells would share an accelerator; else the CPUs over the threads of a cell."""
    if torch.cuda.is_available():
        return 1
    threads: int = max(entry.configuration.namespace.threads for entry in entries)
    return max(1, len(os.sched_getaffinity(0)) // threads)


def _run(entries: list[Entry], workers: int, console: Console) -> list[tuple[Entry, str]]:
    by_cell = {entry.cell: entry for entry in entries}
    errors: list[tuple[Entry, str]] = []
    display = _Display(len(entries), console)

    def ended(cell: Cell, error: str | None) -> None:
        entry = by_cell[cell]
        if error is None and finished(entry.configuration) is None:
            error = f"The cell left no finished result in {entry.configuration.folder}."
        display.ended(entry, error)
        if error is not None:
            errors.append((entry, error))

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
            self._progress.update(task, completed=_experiences_done(entry))
        return self._progress


def _experiences_done(entry: Entry) -> int:
    try:
        return len(read(entry.configuration.folder / FILE_NAME).rows)
    except (OSError, ValueError):  # not begun, or left broken by an earlier attempt
        return 0


def _outcome(entry: Entry) -> str:
    result = read(entry.configuration.folder / FILE_NAME)
    return f"ACC {result.metrics()['acc/sample']:.2f} % in {sum(result.seconds().values()):.0f} s"
