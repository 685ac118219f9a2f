"""How far Lightning's Trainer has come in the training of an experience, as plain values and tensors."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop

from cl_bench.data.loading import StreamLoader


def loops(trainer: Trainer) -> dict[str, Any]:
    """Return the counters of epochs, batches and steps."""
    return trainer.fit_loop.state_dict()


def restore_loops(trainer: Trainer, saved: dict[str, Any], *, inside: bool) -> None:
    """Put the counters back before a fit.

    Args:
        trainer: Between two fits.
        saved: What :func:`loops` returned.
        inside: Whether that was after a batch, so that the epoch goes on; else it was between two epochs.
    """
    fit: _FitLoop = trainer.fit_loop
    fit.load_state_dict(saved)
    if not inside:
        # Lightning goes on inside the epoch of what it loads. Between epochs there is nothing to go on with.
        fit.restarting = False
        for loop in (fit, fit.epoch_loop):
            loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
        for progress in (fit.epoch_progress.total, fit.epoch_progress.current):
            progress.reset_on_restart()


def skip_epochs(trainer: Trainer) -> None:
    """Let the next fit find every epoch done."""
    for name in ("ready", "started", "processed", "completed"):
        setattr(trainer.fit_loop.epoch_progress.current, name, trainer.max_epochs or 0)


def no_epoch_left(trainer: Trainer) -> bool:
    """Whether a fit would find every epoch done."""
    done: int = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    return done >= (trainer.max_epochs or 0)


def training(trainer: Trainer) -> dict[str, Any]:
    """Return the state of optimizers, schedules and of what scales the loss."""
    return {
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "precision": trainer.precision_plugin.state_dict(),
    }


def restore_training(trainer: Trainer, saved: dict[str, Any], batches: int) -> None:
    """Put them back at the start of a fit, before its first step.

    Args:
        trainer: Whose optimizers are built.
        saved: What :func:`training` returned.
        batches: How many of the epoch at hand are done.
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
