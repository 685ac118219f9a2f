"""The survey: rows that are written as they are made, by processes that may die, within a time."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

from cl_bench.results.files import replaced
from cl_bench.survey.plan import Size, Task, plan
from cl_bench.survey.table import Row, markdown
from cl_bench.survey.worker import Worker

ROWS, TABLE = "rows.jsonl", "table.md"

_SETUP_SECONDS = 60.0
_GONE = 1.0  # a row is not started with less time than this, in seconds


class _Rows:
    """The rows in a file, one JSON object a line.

    Args:
        file: The file; a last line that is torn is removed from it.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, threading.Lock()
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
            file.write_text("".join(lines), encoding="utf-8")
        rows = [json.loads(line) for line in lines]
        self.by_name: dict[str, Row] = {row["name"]: row for row in rows}

    def add(self, row: Row) -> None:
        """Write ``row``, whole, before the next one is made."""
        with self._lock, self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
            self.by_name[row["name"]] = row


@dataclass(frozen=True)
class Survey:
    """What a survey found.

    Attributes:
        setup: What was surveyed.
        rows: The rows that are made.
        missing: Names of the rows that are not.
    """

    setup: Row
    rows: Sequence[Row]
    missing: Sequence[str]

    @property
    def complete(self) -> bool:
        """Whether every row is made and none failed."""
        return not self.missing and not any(row["failed"] for row in self.rows)

    @property
    def text(self) -> str:
        """Tables in Markdown, and what failed."""
        return markdown(self.setup, self.rows, self.missing)


@dataclass
class _Desk:
    """Where rows are made.

    Attributes:
        rows: Those that are made.
        folder: Where rows share what they generate.
        end: When the survey ends, in seconds of the monotonic clock.
        report: Called with a line when a row starts and when it ends.
        workers: The process of each thread.
    """

    rows: _Rows
    folder: Path
    end: float
    report: Callable[[str], None]
    workers: dict[int, Worker] = field(default_factory=dict)

    def make(self, task: Task, threads: int) -> None:
        """Make one row, unless the time is over; a row that the end of the time cuts off is not written."""
        left = self.end - time.monotonic()
        if left < _GONE:
            return
        worker = self.workers.setdefault(threading.get_ident(), Worker(self.folder, threads))
        self.report(f"{task.name} starts, {left:.0f} s left")
        found = worker.found(task, min(task.seconds, left))
        if found is None:
            if left < task.seconds:
                self.report(f"{task.name} is cut off by the end of the time")
                return
            found = {"failed": [f"It took more than {task.seconds:.0f} s."], "seconds": task.seconds}
        self.rows.add({"name": task.name, **found})
        outcome = f"failed: {'; '.join(found['failed'])}" if found["failed"] else "done"
        self.report(f"{task.name} {outcome}, {found['seconds']:.1f} s")

    def close(self) -> None:
        """Kill the processes."""
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()


def survey(
    folder: Path,
    size: Size,
    device: str,
    *,
    seconds: float,
    chosen: tuple[str, ...] = ("",),
    report: Callable[[str], None] = lambda _: None,
) -> Survey:
    """Make the rows that ``folder`` does not hold yet, and write the table of all.

    Args:
        folder: Gets a line in ``rows.jsonl`` for each row as it is made, and ``table.md`` at the end.
        size: How large the rows are.
        device: cuda or cpu.
        seconds: When to stop; a later call resumes.
        chosen: What the names of the rows begin with.
        report: Called with a line when a row starts and when it ends.

    Raises:
        ValueError: If the folder holds the rows of another survey, or the device is not there.
    """
    tasks = [task for task in plan(size, device) if task.name.startswith(chosen)]
    if not tasks:
        raise ValueError(f"No row begins with {' or '.join(chosen)}: write for example --rows tiny/lora.")
    folder.mkdir(parents=True, exist_ok=True)
    rows = _Rows(folder / ROWS)
    with TemporaryDirectory() as shared:
        desk = _Desk(rows, Path(shared), time.monotonic() + seconds, report)
        with closing(desk):
            setup = _same_setup(desk, size, device)
            waiting = [task for task in tasks if task.name not in rows.by_name]
            for alone, group in groupby(waiting, key=lambda task: task.alone):
                _make_all(desk, list(group), 1 if alone else size.workers)
    made = [rows.by_name[task.name] for task in tasks if task.name in rows.by_name]
    missing = [task.name for task in tasks if task.name not in rows.by_name]
    found = Survey(setup, made, missing)
    with replaced(folder / TABLE) as file:
        file.write(found.text.encode())
    return found


def _make_all(desk: _Desk, tasks: Sequence[Task], workers: int) -> None:
    """Make rows in ``workers`` processes that share the cores."""
    # Half of the cores at most: a timed row has processes that load as well.
    threads = max(1, (os.cpu_count() or 1) // max(2, workers))
    with ThreadPoolExecutor(workers) as pool:
        try:
            for done in [pool.submit(desk.make, task, threads) for task in tasks]:
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            desk.close()  # the threads wait for these processes
            raise
    desk.close()


def _same_setup(desk: _Desk, size: Size, device: str) -> Row:
    """Return the row of what is surveyed; it must be what the rows in the file were made with."""
    worker = Worker(desk.folder, 1)
    with closing(worker):
        found = worker.found(Task("setup", "setup", {"size": size.name, "device": device}, 0), _SETUP_SECONDS)
    if found is None or found["failed"]:
        raise ValueError(" ".join(found["failed"]) if found else f"The device {device} does not answer.")
    before = desk.rows.by_name.get("setup")
    if before is None:
        desk.rows.add(before := {"name": "setup", **found})
    for key in ("size", "device", "torch", "commit"):
        if before[key] != found[key]:
            raise ValueError(
                f"The rows in this folder are of {key} {before[key]}, and {key} is {found[key]} now: choose "
                "another folder."
            )
    return before
