from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from cl_bench.survey.plan import Task
from cl_bench.survey.worker import Worker

TASK = Task("tiny/ncm", "graphs", {"stem": "ncm", "compiler": "eager", "device": "cpu"}, 60)


def test_a_process_that_hangs_or_dies_is_replaced(tmp_path: Path) -> None:
    worker = Worker(tmp_path, threads=1)
    try:
        assert worker.found(TASK, seconds=0.1) is None

        def die() -> None:
            os.kill(worker._process.pid, signal.SIGKILL)

        threading.Timer(0.5, die).start()
        found = worker.found(TASK, seconds=600)
        assert found is not None and found["failed"] == ["The process ended with status -9."]
        found = worker.found(TASK, seconds=600)
        assert found is not None and not found["failed"] and found["graphs"] >= 0
    finally:
        worker.close()
