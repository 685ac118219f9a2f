"""The verb ``grid``: what is to run, what runs, and what became of it."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cl_bench.grid.cells import Cell, read_grid
from cl_bench.grid.engine import Engine
from cl_bench.grid.sharing import require_shared
from cl_bench.grid.work import Ending, Job
from cl_bench.results.result import FILE_NAME, read
from cl_bench.run.configuration import Configuration
from cl_bench.run.run import finished


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

    def job(self, *, patient: bool) -> Job:
        """The cell as an engine takes it."""
        configuration = self.configuration
        return Job(self.cell, configuration.folder, configuration.namespace.threads, patient)


def run_grid(name: str, results: Path | None, engine: Callable[[Path], Engine], *, dry_run: bool) -> bool:
    """Run the unfinished cells of grid ``name`` and return whether none of them failed.

    Args:
        name: Config stem or path.
        results: Folder of all results, if not the grid's own.
        engine: What runs cells, given the folder of all results.
        dry_run: List the cells and run nothing.

    Raises:
        ValueError: If the grid or any of its cells is not valid, or the engine cannot be used.
            No cell has run then.
    """
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
    return run_waiting(entries, engine(Path(grid.results)), console)


def run_waiting(entries: Sequence[Entry], engine: Engine, console: Console) -> bool:
    """Run those of ``entries`` that are not done, say what failed, and return whether all are done.

    Cells that another process runs come last; by then they are done, or run here if that process is dead.

    Raises:
        ValueError: If the engine cannot be used; no cell has run then.
    """
    waiting = [entry for entry in entries if entry.done is None]
    if not waiting:
        return True
    # A grid that is told to end must end its cells, as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with engine:
            require_shared(waiting[0].configuration.results, engine)
            errors = _run(waiting, engine, console)
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


def _run(entries: list[Entry], engine: Engine, console: Console) -> list[tuple[Entry, str]]:
    display = _Display(len(entries), console)
    with display.live:
        errors, held = _pass_over(entries, engine, display, patient=False)
        if held:
            display.say(f"  {len(held)} cells are being run by another process: waiting for their results")
            errors += _pass_over(held, engine, display, patient=True)[0]
    return errors


def _pass_over(
    entries: list[Entry], engine: Engine, display: _Display, *, patient: bool
) -> tuple[list[tuple[Entry, str]], list[Entry]]:
    """Run ``entries`` and return those that failed, with the reason, and those that another process runs."""
    by_job = {entry.job(patient=patient): entry for entry in entries}
    errors: list[tuple[Entry, str]] = []
    held: list[Entry] = []

    def ended(job: Job, ending: Ending) -> None:
        entry = by_job[job]
        if ending.held:
            display.put_back(entry)
            held.append(entry)
            return
        error = ending.error
        if error is None and finished(entry.configuration) is None:
            error = f"The cell left no finished result in {entry.configuration.folder}."
        display.ended(entry, error)
        if error is not None:
            errors.append((entry, error))

    engine.run(list(by_job), lambda job: display.began(by_job[job]), ended)
    return errors, held


class _Display:
    """A bar over the cells, and a line for each cell that runs, read from its result file."""

    def __init__(self, cells: int, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._cells = self._progress.add_task("cells", total=cells)
        self._running: dict[Entry, TaskID] = {}
        self._changing = threading.Lock()  # cells begin and the picture is drawn in other threads
        self.live = Live(get_renderable=self._render, console=console, refresh_per_second=2, transient=True)

    def began(self, entry: Entry) -> None:
        length = entry.configuration.datamodule.stream_length
        with self._changing:
            self._running[entry] = self._progress.add_task(f"  {entry.title}", total=length)

    def put_back(self, entry: Entry) -> None:
        with self._changing:
            if entry in self._running:  # an engine may see a short job only when it has ended
                self._progress.remove_task(self._running.pop(entry))

    def ended(self, entry: Entry, error: str | None) -> None:
        self.put_back(entry)
        self._progress.advance(self._cells)
        self.say(f"  {entry.title}: {'failed' if error else _outcome(entry)}")

    def say(self, line: str) -> None:
        self.live.console.print(line, markup=False)

    def _render(self) -> Progress:
        with self._changing:
            for entry, task in self._running.items():
                self._progress.update(task, completed=_experiences_done(entry))
        return self._progress


def _experiences_done(entry: Entry) -> int:
    try:
        return len(read(entry.configuration.folder / FILE_NAME).rows)
    except (OSError, ValueError):  # not begun, or left broken by an earlier attempt
        return 0


def _outcome(entry: Entry) -> str:
    path = finished(entry.configuration)
    assert path is not None
    result = read(path)
    return f"ACC {result.metrics()['acc/sample']:.2f} % in {sum(result.seconds().values()):.0f} s"
