"""Several processes in one run: how they start, how their gradients are summed, and how they are checked.

Each has a device and the same model, and takes its part of every batch; see
:mod:`cl_bench.processes.ranks`. They are started by Lightning, which runs the same command again for each, or
by a launcher such as ``fabric run`` or ``torchrun``, which its variables show.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lightning.fabric.strategies.launchers import subprocess_script
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies import Strategy as Distribution
from torch import Tensor

from cl_bench.processes.launcher import launched
from cl_bench.processes.ranks import connected, meet, require_agreement, totals

_Result = TypeVar("_Result")

SECONDS_TO_REPORT = 30.0
"""How long the first process has to write why another one failed, before Lightning kills it."""


class SummedGradients(DDPStrategy):
    """Lightning's ``ddp``, with one sum over the gradients of all processes after every backward pass.

    A method trains a thousandth of the model. PyTorch's wrapper would send the rest at the start of every
    experience, and all buffers, bases and moments included, before every step; it would wait for gradients
    that a frozen part never gets, and it takes the mean over processes, however many images each had. Here a
    training step returns the process's share of the batch loss, so gradients only have to be summed.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._more_to_come = False

    def setup(self, trainer: Trainer) -> None:
        """Prepare a fit or a test."""
        # What a strategy logs is a mean over all processes already.
        warnings.filterwarnings("ignore", message=r".*sync_dist=True.*")
        super().setup(trainer)

    def configure_ddp(self) -> None:
        """Leave the model as it is."""

    def post_backward(self, closure_loss: Tensor) -> None:
        """Sum the gradients, unless more are to be accumulated."""
        assert self.lightning_module is not None
        if not self._more_to_come:
            sum_gradients([p for p in self.lightning_module.parameters() if p.requires_grad])

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Let gradients accumulate on each process."""
        self._more_to_come = True
        try:
            yield
        finally:
            self._more_to_come = False


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Give every process the sum of all gradients; a parameter without one on any process keeps none."""
    if not parameters:
        return
    mine = [p.grad for p in parameters]
    there = parameters[0].new_tensor([gradient is not None for gradient in mine])
    shares = [
        torch.zeros_like(p) if gradient is None else gradient
        for p, gradient in zip(parameters, mine, strict=True)
    ]
    *sums, anywhere = totals([*shares, there])
    needed = anywhere.tolist() if any(gradient is None for gradient in mine) else [1.0] * len(parameters)
    for parameter, gradient, everywhere in zip(parameters, sums, needed, strict=True):
        if everywhere:
            parameter.grad = gradient


class Agreement(Callback):
    """Stops a run at the first step after which its processes differ by a single bit."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare parameters and buffers.

        Raises:
            RuntimeError: If they differ.
        """
        require_agreement(pl_module)


def distribution(strategy: str | Distribution) -> str | Distribution:
    """Return how the trainer's flag ``strategy`` distributes a run: ``ddp`` by :class:`SummedGradients`."""
    return SummedGradients() if strategy == "ddp" else strategy


def require_one_command(strategy: Distribution, world_size: int) -> None:
    """Check that the processes of a run can be started and work together.

    Raises:
        ValueError: If not.
    """
    several = max(world_size, launched()) > 1 or strategy.launcher is not None
    if several and not isinstance(strategy, SummedGradients):
        raise ValueError(
            "A stream runs in several processes only with --trainer.strategy ddp: set that, or start one "
            "process with --trainer.devices 1."
        )
    starts_some = world_size > 1 and not (connected() or "LOCAL_RANK" in os.environ)
    if starts_some and not _has_own_command():
        raise ValueError(
            "A run in several processes starts its own command again, and a cell of a grid has none: run it "
            "with cl-bench run, or set --trainer.devices 1."
        )


def _has_own_command() -> bool:
    """Return whether the command that started this process runs this cell, not a worker or job of a grid."""
    main = getattr(sys.modules["__main__"], "__spec__", None)
    job = main is not None and main.name.startswith("submitit.")
    return multiprocessing.parent_process() is None and not job


def launch(distribution: Distribution, function: Callable[[], _Result]) -> _Result:
    """Start the other processes, if any, connect them, and call ``function`` in each.

    An error in the first process ends the others.
    """
    launcher = distribution.launcher
    if launcher is None:
        return function()
    threads = torch.get_num_threads()
    subprocess_script._ChildProcessObserver = _Patient  # type: ignore[misc]

    def work() -> _Result:
        torch.set_num_threads(threads)  # Lightning shares the CPUs out; sums depend on the number of threads
        distribution.setup_environment()
        meet()
        return function()

    try:
        found: _Result = launcher.launch(work)
    except BaseException:
        for child in getattr(launcher, "procs", ()):
            child.kill()  # it may wait for a sum that never comes
        raise
    return found


class _Patient(subprocess_script._ChildProcessObserver):
    """Kills the first process if another one failed, but not while it may still report the failure.

    Lightning's own looks every five seconds and kills at once, so some failures had no result file.
    """

    def _terminate_all(self) -> None:
        time.sleep(SECONDS_TO_REPORT)
        super()._terminate_all()
