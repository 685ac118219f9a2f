"""Everything that reaches into Lightning's internals: counters, optimizers, the datamodule, signals.

Measured with Lightning 2.6. A name with an underscore below is private to Lightning and may change with its
next minor version; no other file of the library uses one.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch.optim import Optimizer

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.data.loading import StreamLoader


class _NoSignals(_SignalConnector):
    """Leaves signals to the run, which handles them between two steps.

    Lightning's handler of SIGTERM broadcasts from wherever the signal arrives, which may be inside another
    sum; the processes would then wait for each other forever.
    """

    def register_signal_handlers(self) -> None:
        """Register none."""


def leave_signals(trainer: Trainer) -> None:
    """Keep Lightning from handling signals."""
    trainer._signal_connector = _NoSignals(trainer)


def stream_of(trainer: Trainer) -> StreamDataModule:
    """Return the datamodule that the trainer works on."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(datamodule, StreamDataModule)
    return datamodule


def loops(trainer: Trainer) -> dict[str, Any]:
    """Return the counters of epochs, batches and steps."""
    return trainer.fit_loop.state_dict()


def restore_loops(trainer: Trainer, saved: dict[str, Any], *, inside: bool) -> None:
    """Restore the counters before a fit.

    Args:
        trainer: Between two fits.
        saved: What :func:`loops` returned.
        inside: Whether that was after a batch, so that the epoch continues; else it was between two epochs.
    """
    fit: _FitLoop = trainer.fit_loop
    fit.load_state_dict(saved)
    if not inside:
        # Lightning continues inside the epoch of what it loads. Between epochs there is nothing to continue.
        fit.restarting = False
        for loop in (fit, fit.epoch_loop):
            loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
        for progress in (fit.epoch_progress.total, fit.epoch_progress.current):
            progress.reset_on_restart()


def start_epochs(trainer: Trainer, epochs: int | None) -> None:
    """Let the next fit train ``epochs`` epochs from the first."""
    trainer.fit_loop.epoch_progress.reset()
    trainer.fit_loop.max_epochs = epochs


def skip_epochs(trainer: Trainer) -> None:
    """Let the next fit treat every epoch as done."""
    for name in ("ready", "started", "processed", "completed"):
        setattr(trainer.fit_loop.epoch_progress.current, name, trainer.max_epochs or 0)


def no_epoch_left(trainer: Trainer) -> bool:
    """Whether a fit would treat every epoch as done."""
    done: int = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    return done >= (trainer.max_epochs or 0)


def ends_epoch(trainer: Trainer) -> bool:
    """Whether the batch just trained was the last of its epoch, or its gradients still accumulate."""
    loop = trainer.fit_loop.epoch_loop
    return bool(loop.batch_progress.is_last_batch or loop._should_accumulate())


def in_one_kernel(optimizer: Optimizer) -> Optimizer:
    """Let ``optimizer`` move all parameters in one kernel if PyTorch can, unless a setting says otherwise.

    One by one, the many small factors of the adapters would take longer to move than the arithmetic does.

    >>> optimizer = in_one_kernel(torch.optim.Adam([torch.zeros(1, requires_grad=True)]))
    >>> optimizer.param_groups[0]["fused"]
    True
    """
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.SGD)):  # AdamW is an Adam
        for group in optimizer.param_groups:
            if group["fused"] is None and group["foreach"] is None and not group["differentiable"]:
                group["fused"] = True
    return optimizer


def training(trainer: Trainer) -> dict[str, Any]:
    """Return the state of optimizers, schedules and loss scaling."""
    return {
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "precision": trainer.precision_plugin.state_dict(),
    }


def restore_training(trainer: Trainer, saved: dict[str, Any], batches: int) -> None:
    """Restore them at the start of a fit, before its first step.

    Args:
        trainer: Its optimizers are built.
        saved: What :func:`training` returned.
        batches: How many batches of the epoch at hand are done.
    """
    for optimizer, state in zip(trainer.optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    for config, state in zip(trainer.lr_scheduler_configs, saved["schedules"], strict=True):
        config.scheduler.load_state_dict(state)
    trainer.precision_plugin.load_state_dict(saved["precision"])
    if batches:
        loader = trainer.train_dataloader
        assert isinstance(loader, StreamLoader)
        loader.load_state_dict({"batches": batches})
