"""Runs cells in processes that are killed, and keeps their last checkpoint. A script, so that it may fork.

python tests/loop/killed.py FOLDER reads a list of [strategy, name of the run, where to kill it] from standard
input: null to let it finish, a number of seconds, or a key of KILLERS with the index of the experience and
the number of the call, from 1. It prints the exit status of each run.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Trainer

from cl_bench.contracts.strategy import Strategy
from cl_bench.data.experience import Experience
from cl_bench.loop import callbacks, continuation
from cl_bench.loop.callbacks import StreamMetrics
from cl_bench.loop.checkpoint import Checkpoint, Checkpoints
from cl_bench.network.adapters import AdaptedLinear
from cl_bench.run.configs import CONFIGS
from cl_bench.run.configuration import Configuration, resolve
from cl_bench.run.run import quiet, run

Place = list[Any] | float | None

LAYER = {
    "backbone": {
        "model": "vision_transformer",
        "weights": "random",
        "options": {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
        "normalisation": "half",
    },
    "data": {
        "class_path": "datamodules.toy.Toy",
        "init_args": {"num_classes": 6, "num_experiences": 3, "image_size": 8, "batch_size": 16},
    },
    "trainer": {"max_epochs": 3, "accelerator": "cpu"},
}


def configuration(strategy: str, folder: Path) -> Configuration:
    overrides = [f"--results={folder}", "--rank=4", "--checkpoint_every=0"]
    return resolve([CONFIGS / "trainer.yaml", CONFIGS / "strategies" / f"{strategy}.yaml", LAYER], overrides)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Counter:
    """Counts the calls of a function within one experience, and kills the process at one of them."""

    def __init__(self, experience: int, number: int) -> None:
        self.experience, self.number, self.calls, self.now = experience, number, 0, -1
        expand = Strategy.expand

        def watched(strategy: Strategy, experience: Experience) -> None:
            self.now = experience.index
            expand(strategy, experience)

        Strategy.expand = watched  # type: ignore[method-assign, assignment]

    @property
    def is_time(self) -> bool:
        """Count a call, and return whether it is the last one."""
        if self.now != self.experience:
            return False
        self.calls += 1
        return self.calls == self.number

    def patch(self, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.is_time:
                die()
            return function(*args, **kwargs)

        setattr(owner, name, counted)

    def pass_over_data(self, after: bool) -> None:
        on_device = callbacks.on_device

        def watched(trainer: Trainer, loader: Any) -> Any:
            for batch in on_device(trainer, loader):
                if after == bool(trainer.current_epoch) and self.is_time:
                    die()
                yield batch

        callbacks.on_device = watched

    def half_a_checkpoint(self) -> None:
        save = torch.save

        def cut(content: Any, file: Any) -> None:
            if self.is_time:
                file.write(b"PK half of a checkpoint")
                file.flush()
                die()
            save(content, file)

        torch.save = cut  # type: ignore[assignment]

    def no_room_for_checkpoints(self) -> None:
        """Let no file grow beyond what a result needs."""
        write = Checkpoints.write

        def limited(checkpoints: Checkpoints, checkpoint: Checkpoint) -> Path:
            if self.is_time:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, resource.RLIM_INFINITY))
            return write(checkpoints, checkpoint)

        Checkpoints.write = limited  # type: ignore[method-assign, assignment]

    def file_not_yet_in_its_place(self, suffix: str) -> None:
        replace = os.replace

        def cut(source: Any, target: Any) -> None:
            if str(target).endswith(suffix) and self.is_time:
                die()
            replace(source, target)

        os.replace = cut  # type: ignore[assignment]


KILLERS: dict[str, Callable[[Counter], None]] = {
    "pass before training": lambda counter: counter.pass_over_data(after=False),
    "restoration": lambda counter: counter.patch(continuation, "restore"),
    "step": lambda counter: counter.patch(Strategy, "on_before_optimizer_step"),
    "pass after training": lambda counter: counter.pass_over_data(after=True),
    "merge": lambda counter: counter.patch(AdaptedLinear, "merge"),
    "evaluation": lambda counter: counter.patch(StreamMetrics, "on_test_batch_end"),
    "checkpoint": lambda counter: counter.half_a_checkpoint(),
    "new checkpoint": lambda counter: counter.file_not_yet_in_its_place(".ckpt"),
    "full disk": lambda counter: counter.no_room_for_checkpoints(),
    "result": lambda counter: counter.file_not_yet_in_its_place("result.json"),
}


def keep_last_checkpoint(folder: Path) -> None:
    def kept(self: Checkpoints) -> None:
        assert self.last is not None
        shutil.copy(self.last, folder / "last.ckpt")

    Checkpoints.clear = kept  # type: ignore[method-assign]


def work(strategy: str, folder: Path, place: Place) -> None:
    if isinstance(place, list):
        KILLERS[place[0]](Counter(*place[1:]))
    elif place is not None:
        threading.Timer(place, die).start()
    keep_last_checkpoint(folder)
    with quiet():
        run(configuration(strategy, folder))


def forked(strategy: str, folder: Path, place: Place) -> int:
    """Return the exit status of a run, or the negative number of the signal that ended it.

    If the run has finished before, another one starts in a folder of its own.
    """
    while (folder / "last.ckpt").exists():
        folder = folder.with_name(f"{folder.name}+")
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        try:
            work(strategy, folder, place)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    root, runs = Path(sys.argv[1]), json.load(sys.stdin)
    with TemporaryDirectory() as scratch, quiet():
        run(configuration("lora", Path(scratch)))  # imports what a run imports late, once for all forks
    print(json.dumps([forked(strategy, root / name, place) for strategy, name, place in runs]))
