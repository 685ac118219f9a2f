"""What the terminal shows during a run: a progress bar, and a line for every finished experience."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cl_bench.data.experience import Experience
from cl_bench.loop.continuation import resumption
from cl_bench.loop.progress import stream_of
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.results.result import FILE_NAME, Result
from cl_bench.run.configuration import Configuration

_CHANCE = 0.01  # probability below which a number of correct images is not called chance


class RunConsole(Callback):
    """Show the progress of a run on a terminal.

    Args:
        console: Where to print.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)
        self._began = 0.0
        self._announced = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print once from where an interrupted run is resumed."""
        assert isinstance(trainer, StreamTrainer)
        if not self._announced:
            self._announced, self._began = True, time.perf_counter()
            if (line := resumption(trainer.result)) is not None:
                self.console.print(line, markup=False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show which experience starts."""
        self._began = time.perf_counter()
        if self.console.is_terminal:  # in a file, a bar would only leave blank lines
            self._progress.start()
        self._progress.reset(
            self._task, description=f"experience {_place(stream_of(trainer).experience)}", total=None
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show which epoch starts."""
        epochs, place = trainer.max_epochs or 1, _place(stream_of(trainer).experience)
        self._progress.update(
            self._task,
            description=f"experience {place} · epoch {trainer.current_epoch + 1}/{epochs}",
            total=epochs * trainer.num_training_batches,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar by one step."""
        self._progress.advance(self._task)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line of the finished experience."""
        if self.console.is_terminal:
            self._progress.stop()
        experience = stream_of(trainer).experience
        assert isinstance(trainer, StreamTrainer)
        accuracy = trainer.result.metrics_after(len(trainer.result.rows) - 1)["acc/sample"]
        classes = f"classes {experience.classes.start} to {experience.classes.stop - 1}"
        self.console.print(
            f"  experience {_place(experience)}  {classes:<18} "
            f"accuracy over {experience.num_classes_seen} classes "
            f"{accuracy:5.1f} %  {time.perf_counter() - self._began:6.1f} s",
            highlight=False,
        )


def _place(experience: Experience) -> str:
    return f"{experience.index + 1}/{experience.num_experiences}"


def opening_lines(configuration: Configuration) -> str:
    """Return two lines that describe the run, and a third if its dataset has several variants."""
    values = configuration.namespace
    weights = (
        f"seeded random weights ({values.backbone.seed})"
        if values.backbone.weights == "random"
        else values.backbone.weights
    )
    regime = " (joint)" if values.regime == "joint" else ""
    return (
        f"{configuration.strategy_class.name}{regime} on {configuration.benchmark} · "
        f"order {configuration.datamodule.order_name} · seed {values.seed} · cell {configuration.hash}\n"
        f"backbone {values.backbone.model}, {weights}, inputs {values.backbone.normalisation}"
        + _variants(configuration)
    )


def _variants(configuration: Configuration) -> str:
    """Return the chosen variants of the dataset and its validation split as a line of their own, if any."""
    data = configuration.datamodule
    chosen = [f"{name.replace('_', ' ')} {value}" for name, value in data.variants.items()]
    if data.evaluated_on == "validation":
        chosen.append(f"evaluated on {data.val_fraction:.0%} of the training images, to choose settings")
    return f"\n{', '.join(chosen)}" if chosen else ""


def closing_lines(result: Result, folder: Path) -> str:
    """Return metrics and times of a finished run, a warning if it ended at chance, and its result file."""
    named = {"ACC": "acc/sample", "MAA": "maa/sample", "BWT": "bwt/gem", "forgetting": "forgetting/chaudhry"}
    values = result.metrics()
    numbers = "  ".join(
        f"{name} {values[key]:.2f}" for name, key in named.items() if values[key] == values[key]
    )
    seconds = ", ".join(
        f"{phase.replace('_', ' ')} {value:.1f} s" for phase, value in result.seconds().items()
    )
    lines = [f"{result.strategy}: {numbers}", chance(result), seconds, str(folder / FILE_NAME)]
    return "\n".join(line for line in lines if line is not None)


def chance(result: Result) -> str | None:
    """Return a sentence with a remedy if the final accuracy is not above chance, and None if it is.

    Chance is to answer every image with the largest class. Accuracy is above it if so many correct images, or
    more, would come by chance in fewer than one of a hundred runs.
    """
    from scipy.stats import binom

    row = result.rows[-1]
    assert row is not None
    correct, images = sum(row.correct), sum(result.test_images)
    share = max(result.test_images) / images
    if binom.sf(correct - 1, images, share) < _CHANCE:
        return None
    model = result.config.get("model", {}).get("init_args", {})
    remedy = (
        "start the heads from class means with --head_start means"
        if model.get("head_start") == "random"
        else "try another --optimizer.lr and more --max_epochs, and compare with ncm"
    )
    return (
        f"warning: {correct} of {images} images are correct, which is not above chance "
        f"({100 * share:.1f} %): {remedy}"
    )
