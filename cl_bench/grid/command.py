"""The verb ``grid``: which cells must run, their progress, and their results."""

from __future__ import annotations

import json
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    track,
)

from cl_bench.grid.cells import Cell, Grid, configurations, read_grid
from cl_bench.grid.engine import Engine
from cl_bench.grid.sharing import require_shared
from cl_bench.grid.work import Job, Outcome
from cl_bench.results.result import FILE_NAME, read
from cl_bench.run.configuration import Configuration
from cl_bench.run.run import finished, images_now, require_same_images
from cl_bench.run.tracking import how_to_read

# Settings of a dataset that leave its images as they are; cells of a grid may differ in them.
_NOT_OF_IMAGES = {
    "batch_size",
    "num_classes_per_experience",
    "num_experiences",
    "num_workers",
    "test_batch_size",
}


@dataclass(frozen=True, eq=False)
class Entry:
    """A cell of a grid, and its result if there is one.

    Attributes:
        cell: The words of its command.
        configuration: Its resolved configuration.
        done: Its result file if it is finished, otherwise None.
    """

    cell: Cell
    configuration: Configuration
    done: Path | None = None

    @property
    def title(self) -> str:
        """Strategy, benchmark, order and seed in a few words."""
        folder = self.configuration.folder
        return f"{folder.parent.name} on {self.configuration.benchmark}, {folder.name}"

    def job(self, *, waits: bool) -> Job:
        """The cell as an engine runs it; ``waits`` if another process runs it already."""
        configuration = self.configuration
        return Job(self.cell, configuration.folder, configuration.namespace.threads, waits)

    def error(self, outcome: Outcome) -> str | None:
        """What went wrong in a run that ended with ``outcome``; None if nothing did."""
        if outcome.error is None and finished(self.configuration) is None:
            return f"The cell has no finished result in {self.configuration.folder}."
        return outcome.error

    def closing(self) -> str:
        """How the finished cell ended, in a few words."""
        path = finished(self.configuration)
        assert path is not None
        result = read(path)
        return f"ACC {result.metrics()['acc/sample']:.2f} % in {sum(result.seconds().values()):.0f} s"


class Tuned(Protocol):
    """Tunes the strategies of a grid."""

    def __call__(
        self, grid: Grid, engine: Callable[[Path], Engine], console: Console, *, dry_run: bool
    ) -> tuple[list[Cell], bool]:
        """Return the cells of ``grid`` with the settings that were found, and whether no trial failed."""


def run_grid(
    name: str,
    results: Path | None,
    engine: Callable[[Path], Engine],
    *,
    tuned: Tuned,
    dry_run: bool,
) -> bool:
    """Run the unfinished cells of grid ``name`` and return whether none of them failed.

    Args:
        name: Config stem or path.
        results: Folder of all results; None means that of the grid.
        engine: Returns the engine, given the folder of all results.
        tuned: Tunes a grid with the key ``tune``, before its cells run.
        dry_run: Whether to list the cells and run nothing.

    Raises:
        ValueError: If the grid or one of its cells is not valid, or the engine cannot be used. No cell has
        run
            then.
    """
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    grid = read_grid(name, results)
    cells, all_tuned = [*grid.cells()], True
    if grid.tune:
        [*configurations(cells)]  # what is not valid is refused before anything is tuned
        cells, all_tuned = tuned(grid, engine, console, dry_run=dry_run)
    entries = known(cells)
    waiting = [entry for entry in entries if entry.done is None]
    console.print(
        f"{len(entries)} cells, {len(entries) - len(waiting)} done, results in {grid.results}", markup=False
    )
    if dry_run:
        for entry in entries:
            state = "done  " if entry.done else "to run"
            console.print(f"  {state}  {entry.configuration.hash}  {entry.cell.command}", markup=False)
        return True
    return run_waiting(entries, engine(Path(grid.results)), console) and all_tuned


def run_waiting(entries: Sequence[Entry], engine: Engine, console: Console) -> bool:
    """Run those of ``entries`` that are not done, print which failed, and return whether all are done.

    Cells that another process runs come last. By then they are done, or that process is dead and they run
    here.

    Raises:
        ValueError: If the engine cannot be used. No cell has run then.
    """
    waiting = [entry for entry in entries if entry.done is None]
    if not waiting:
        return True
    with working(engine, waiting[0].configuration.results):
        errors = run_entries(waiting, engine, console)
    lines = [f"{len(entries) - len(errors)} of {len(entries)} cells done"]
    lines += how_to_read([entry.configuration for entry in entries])
    console.print("\n".join(lines), markup=False)
    return not errors


@contextmanager
def working(engine: Engine, results: Path) -> Iterator[Engine]:
    """Enter the context of ``engine``, whose machines must see the folder ``results``.

    Raises:
        ValueError: If the engine cannot be used.
    """
    # SIGTERM must terminate the cells of the grid, as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with engine:
            require_shared(results, engine)
            yield engine
    finally:
        signal.signal(signal.SIGTERM, before)


def known(cells: Sequence[Cell]) -> list[Entry]:
    """Return ``cells`` with their configurations and finished results.

    Raises:
        ValueError: If a cell is not valid, or two of them are the same.
    """
    errors = Console(stderr=True)
    shown = track(
        configurations(cells),
        "reading cells",
        len(cells),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )
    present = cache(_present)
    entries = [
        Entry(
            cell,
            configuration,
            finished(configuration) if configuration.hash in present(_benchmark(configuration)) else None,
        )
        for cell, configuration in zip(cells, shown, strict=True)
    ]
    _require_same_images(entries)
    hashes = Counter(entry.configuration.hash for entry in entries)
    for entry in entries:
        if hashes[entry.configuration.hash] > 1:
            raise ValueError(f"The grid contains this cell twice: {entry.cell.command}. Remove one of them.")
    return entries


def _require_same_images(entries: Sequence[Entry]) -> None:
    """Check that finished results are of the images that their datasets hold now, each read once."""
    images: dict[str, dict[str, str]] = {}
    for entry in entries:
        if entry.done is not None:
            data = entry.configuration.resolved["data"]
            settings = {key: value for key, value in data["init_args"].items() if key not in _NOT_OF_IMAGES}
            key = json.dumps([data["class_path"], settings])
            if key not in images:
                images[key] = images_now(entry.configuration)
            require_same_images(entry.done, entry.configuration, images[key])


def _benchmark(configuration: Configuration) -> Path:
    return configuration.results / configuration.benchmark


def _present(benchmark: Path) -> set[str]:
    """Return the hashes of the cells that have a folder in ``benchmark``."""
    return {path.name.rpartition("-")[2] for path in benchmark.glob("*/*")}


def run_entries(entries: Sequence[Entry], engine: Engine, console: Console) -> list[tuple[Entry, str]]:
    """Run ``entries`` on a working engine, print which failed, and return these with the reason."""
    display = _Display(len(entries), console)
    with display.live:
        errors, held = _run_once(entries, engine, display, waits=False)
        if held:
            display.print(f"  another process runs {len(held)} of the cells: waiting for their results")
            errors += _run_once(held, engine, display, waits=True)[0]
    for entry, error in errors:
        console.print(f"failed: {entry.title}\n  {error}\n  {entry.cell.command}", markup=False)
    return errors


def _run_once(
    entries: Sequence[Entry], engine: Engine, display: _Display, *, waits: bool
) -> tuple[list[tuple[Entry, str]], list[Entry]]:
    """Run ``entries`` and return those that failed, with the reason, and those that another process runs."""
    by_job = {entry.job(waits=waits): entry for entry in entries}
    errors: list[tuple[Entry, str]] = []
    held: list[Entry] = []

    def ended(job: Job, outcome: Outcome) -> None:
        entry = by_job[job]
        if outcome.held:
            display.remove(entry)
            held.append(entry)
            return
        error = entry.error(outcome)
        display.ended(entry, error)
        if error is not None:
            errors.append((entry, error))

    engine.run(list(by_job), lambda job: display.started(by_job[job]), ended)
    return errors, held


class _Display:
    """A progress bar of the cells, and one for each running cell, whose progress its result file shows."""

    def __init__(self, cells: int, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._cells = self._progress.add_task("cells", total=cells)
        self._running: dict[Entry, TaskID] = {}
        self._changing = threading.Lock()  # other threads start cells and draw the bars
        self.live = Live(get_renderable=self._render, console=console, refresh_per_second=2, transient=True)

    def started(self, entry: Entry) -> None:
        length = entry.configuration.datamodule.stream_length
        with self._changing:
            self._running[entry] = self._progress.add_task(f"  {entry.title}", total=length)

    def remove(self, entry: Entry) -> None:
        with self._changing:
            if entry in self._running:  # engines may miss the start of a short job
                self._progress.remove_task(self._running.pop(entry))

    def ended(self, entry: Entry, error: str | None) -> None:
        self.remove(entry)
        self._progress.advance(self._cells)
        self.print(f"  {entry.title}: {'failed' if error else entry.closing()}")

    def print(self, line: str) -> None:
        self.live.console.print(line, markup=False)

    def _render(self) -> Progress:
        with self._changing:
            for entry, task in self._running.items():
                self._progress.update(task, completed=_experiences_done(entry))
        return self._progress


def _experiences_done(entry: Entry) -> int:
    try:
        return len(read(entry.configuration.folder / FILE_NAME).rows)
    except (OSError, ValueError):  # the result is missing, or damaged by an earlier attempt
        return 0
