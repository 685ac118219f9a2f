"""What a run does around an experience beside its steps, its passes over the data and its evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.loggers import CSVLogger
from torch.utils.benchmark import timer

from cl_bench.bench.stream import ShortStream
from cl_bench.bench.subject import configured
from cl_bench.loop.checkpoint import FOLDER_NAME, Checkpoints
from cl_bench.run.configs import Config

_COUNTED = ("training", "data_passes", "evaluation")
_WRITTEN = 4  # checkpoints of an experience: one before each of its phases


class Turn(NamedTuple):
    """What the second experience of a run of two took, in seconds.

    Attributes:
        seconds: Beginning and end of fit and test, checkpoints, and the result file.
        checkpoint: One checkpoint, on average; more are written in a long training, one a minute at most.
    """

    seconds: float
    checkpoint: float


def turn(stem: str, *, backbone: Config, trainer: Config, stream: Config, folder: Path) -> Turn:
    """Run a strategy from end to end, one batch an epoch, with checkpoints, and return what that adds.

    Args:
        stem: Config of the strategy.
        backbone: Arguments of the backbone.
        trainer: Arguments of the trainer.
        stream: Arguments of the stream.
        folder: Where curves, checkpoints and result are written.
    """
    given = stream | {"num_experiences": 2}
    configuration = configured(stem, ShortStream, backbone=backbone, trainer=trainer, stream=given)
    strategy, running = configuration.build([], [CSVLogger(folder, name=stem)])
    datamodule = configuration.datamodule
    assert isinstance(datamodule, ShortStream)
    checkpoints = Checkpoints(folder / FOLDER_NAME, cell="bench")
    result = running.run(strategy, datamodule, folder=folder, checkpoints=checkpoints)
    whole = timer() - datamodule.entered
    seconds = result.costs[-1].seconds
    counted = sum(seconds[phase] for phase in _COUNTED)
    return Turn(whole - counted, seconds["checkpoints"] / _WRITTEN)
