"""The one loop over the experiences of a stream."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.seed import seed_everything
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy as Distribution
from torch.utils.data import DataLoader

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.contracts.strategy import Batch, Strategy
from cl_bench.data.experience import Experience
from cl_bench.errors import is_of_memory, sentence
from cl_bench.loop import progress
from cl_bench.loop.callbacks import Diverged, DivergenceGuard, StreamMetrics
from cl_bench.loop.checkpoint import Checkpoints, Phase
from cl_bench.loop.continuation import Continuation
from cl_bench.loop.interruption import Interrupted
from cl_bench.loop.provenance import provenance
from cl_bench.processes.distributed import Agreement, OwnSignals, distribution, launch, require_one_command
from cl_bench.processes.ranks import agree, failed_first, is_first
from cl_bench.results.result import Cost, Protocol, Regime, Result


class OutOfMemory(RuntimeError):
    """A batch does not fit into memory."""


class StreamTrainer(Trainer):
    """A Lightning Trainer that walks a stream: one Trainer, one fit and one test for each experience.

    Every argument is Lightning's; only some defaults differ, because a stream needs them so.

    Args:
        callbacks: As in Lightning.
        logger: As in Lightning, off unless given.
        enable_checkpointing: Off: checkpoints of a single fit know nothing of the stream.
        enable_progress_bar: Off: one bar for each fit and test says little about the stream.
        enable_model_summary: Off.
        use_distributed_sampler: Off: it repeats samples to even out the ranks, and counts would be wrong.
        num_sanity_val_steps: None: nothing is validated.
        devices: One, unless more are asked for.
        strategy: As in Lightning, where several processes are ``ddp``.
        check_agreement: Whether every step checks that all processes hold the same parameters, for debugging.
        gradient_clip_val: As in Lightning.
        limit_train_batches: As in Lightning.
        limit_test_batches: Whatever cuts test images is refused.
        overfit_batches: As in Lightning.
        kwargs: As in Lightning.

    Attributes:
        seconds: Seconds of the experience at hand so far, by phase.
    """

    # Lightning annotates some numbers with typing's unions, whose members change places with the order of
    # imports; with them 1 would be read as 1 or as 1.0. The annotations here are read instead.

    def __init__(
        self,
        *,
        callbacks: list[Callback] | Callback | None = None,
        logger: Logger | Iterable[Logger] | bool | None = False,
        enable_checkpointing: bool | None = False,
        enable_progress_bar: bool | None = False,
        enable_model_summary: bool | None = False,
        use_distributed_sampler: bool = False,
        num_sanity_val_steps: int | None = 0,
        devices: list[int] | str | int = 1,
        strategy: str | Distribution = "auto",
        check_agreement: bool = False,
        gradient_clip_val: float | None = None,
        limit_train_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        **kwargs: Any,
    ) -> None:
        given = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or [])
        checks = [Agreement()] if check_agreement else []
        guard = DivergenceGuard()
        super().__init__(
            callbacks=[guard, _Lifecycle(guard), *checks, *given],
            logger=logger,
            enable_checkpointing=enable_checkpointing,
            enable_progress_bar=enable_progress_bar,
            enable_model_summary=enable_model_summary,
            use_distributed_sampler=use_distributed_sampler,
            num_sanity_val_steps=num_sanity_val_steps,
            devices=devices,
            strategy=distribution(strategy),
            gradient_clip_val=gradient_clip_val,
            limit_train_batches=limit_train_batches,
            limit_test_batches=limit_test_batches,
            overfit_batches=overfit_batches,
            **kwargs,
        )
        self._signal_connector = OwnSignals(self)
        self._epochs = self.fit_loop.max_epochs
        self.seconds: dict[str, float] = {}
        self._trainable = 0
        self._result: Result | None = None
        self._continuation: Continuation | None = None
        self._stepping = False

    @property
    def result(self) -> Result:
        """The result of the stream so far."""
        if self._result is None:
            raise RuntimeError("No stream has been run yet: call run(strategy, datamodule) first.")
        return self._result

    def run(
        self,
        strategy: Strategy,
        datamodule: StreamDataModule,
        *,
        regime: Regime = "sequential",
        config: dict[str, Any] | None = None,
        setting: str | None = None,
        folder: Path | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> Result:
        """Train and evaluate ``strategy`` on the whole stream of ``datamodule``.

        Of several processes each returns the result, and the first alone writes it.

        Args:
            strategy: The method; it is changed in place.
            datamodule: The stream, with its seed and class order.
            regime: ``sequential``, or ``joint``: one experience of all classes, evaluated per original one.
            config: Resolved config, kept in the result; its hash names the cell.
            setting: Name of the setting, kept in the result.
            folder: Where ``result.json`` is rewritten after every experience; nowhere if None.
            checkpoints: Where the run is written down at every turn, and gone on with if it was cut off; they
                are removed when it is done. Nothing of the kind if None.

        Returns:
            The result, with status ``done``.

        Raises:
            ValueError: If the stream or the strategy's parts do not fit together.
            Refused: If a checkpoint is there that cannot be gone on with.
            OSError: If result or checkpoint cannot be written; the ones before are still there.
            Diverged: If the loss is no longer finite.
            OutOfMemory: If a batch does not fit into memory.
            KeyboardInterrupt: If Ctrl-C or SIGTERM asked the run to end; the step at hand is finished first.
        """
        self.require_fit(strategy, datamodule)
        result = self._result = self._blank_result(strategy, datamodule, regime, config or {}, setting)
        written = folder if is_first() else None
        launch(self.strategy, lambda: self._run_stream(strategy, datamodule, result, written, checkpoints))
        return result

    def _run_stream(
        self,
        strategy: Strategy,
        datamodule: StreamDataModule,
        result: Result,
        folder: Path | None,
        checkpoints: Checkpoints | None,
    ) -> None:
        """Fill ``result``, once all processes of the run are there."""
        counting = StreamMetrics(result)
        self.callbacks.insert(0, counting)  # type: ignore[attr-defined]
        if self.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.strategy.root_device)
        continuation = self._continuation = Continuation(self, strategy, result, checkpoints)
        _save(result, folder)
        try:
            with continuation.interruption, self._batch_size_said(datamodule):
                self._walk(strategy, datamodule, result, folder)
            result.status = "done"
        except BaseException as error:
            asked = isinstance(error, Interrupted | KeyboardInterrupt)
            # Processes that load images die of a Ctrl-C, too, which then is what was asked and no failure.
            asked |= continuation.interruption.requested and not isinstance(error, Diverged)
            result.status = "diverged" if isinstance(error, Diverged) else "failed"
            own = "Interrupted." if asked else sentence(error)
            result.error = failed_first(own) or own + ("" if asked else continuation.last_good)
            if asked:
                raise KeyboardInterrupt from error
            raise
        finally:
            datamodule.close()
            self.callbacks.remove(counting)  # type: ignore[attr-defined]
            self._continuation = None
            _save(result, folder)
        continuation.clear()

    def _walk(
        self, strategy: Strategy, datamodule: StreamDataModule, result: Result, folder: Path | None
    ) -> None:
        """Learn and evaluate one experience after the other, from where an earlier attempt was cut off."""
        resumed = self._continuation.resumed if self._continuation is not None else None
        for experience in _experiences(datamodule, result.regime)[resumed.experience if resumed else 0 :]:
            self.learn(strategy, datamodule, experience)
            self._evaluate(strategy, datamodule, result)
            with self.phase("checkpoints"):
                _save(result, folder)

    def require_fit(self, strategy: Strategy, datamodule: StreamDataModule) -> None:
        """Read the data, and check that strategy, stream and trainer go together.

        Raises:
            ValueError: If they do not.
            FileNotFoundError: If the data are not there.
        """
        datamodule.prepare_data()
        datamodule.setup("fit")
        _require_equal_image_size(strategy, datamodule)
        if strategy.head.num_classes:
            raise ValueError(
                f"This strategy has learnt {strategy.head.num_classes} classes already: "
                "build a new one for a new stream."
            )
        require_one_command(self.strategy, self.world_size)
        self._require_whole_epochs()

    def protocol(self, strategy: Strategy, datamodule: StreamDataModule) -> Protocol:
        """Return what decides whether results of ``strategy`` on ``datamodule`` may stand beside others."""
        experiences = datamodule.experiences
        identity = {
            **datamodule.protocol(),
            "backbone": strategy.backbone.protocol(),
            "precision": str(self.precision),
            "experience_sizes": [experience.num_classes for experience in experiences],
        }
        factors = {"seed": datamodule.seed, "order": datamodule.order_name}
        axes = {"dataset": datamodule.name, "num_experiences": len(experiences)}
        return Protocol(identity, factors, axes)

    def _require_whole_epochs(self) -> None:
        """Refuse what would cut the stream short and leave numbers that look like results."""
        cut_short = {
            "fast_dev_run": bool(self.fast_dev_run),  # type: ignore[attr-defined]
            "max_steps": self.max_steps != -1,
            "max_time": any(isinstance(callback, Timer) for callback in self.callbacks),  # type: ignore[attr-defined]
            "max_epochs": self._epochs is None or self._epochs < 0,
        }
        for key, given in cut_short.items():
            if given:
                raise ValueError(
                    f"Every experience is trained for the same whole number of epochs, and {key} would "
                    "change that: give max_epochs, 0 or more."
                )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds spent inside towards phase ``name`` of this experience."""
        start = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def on_device(self, loader: DataLoader[Batch]) -> Iterator[Batch]:
        """Yield the batches of ``loader`` in the precision and on the device of this trainer."""
        for batch in loader:
            images, labels = self.strategy.batch_to_device(self.precision_plugin.convert_input(batch))
            yield images, labels

    def _now(self) -> float:
        """Return the seconds on a clock, once the device has done what it was given."""
        if self.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(self.strategy.root_device)
        return time.perf_counter()

    def learn(self, strategy: Strategy, datamodule: StreamDataModule, experience: Experience) -> None:
        """Train ``strategy`` on one experience, and evaluate nothing; :meth:`run` does so for all of them.

        Args:
            strategy: The method, as the experience before left it.
            datamodule: The stream, set up; afterwards it serves this experience.
            experience: The next one.
        """
        on_cpu = self.strategy.root_device.type == "cpu"
        strategy.backbone.compute_in(self.precision_plugin.forward_context)
        strategy.backbone.fuse_attention(not (on_cpu and str(self.precision).startswith("bf16")))
        next_phase = self._next_phase
        if self._continuation is None or self._continuation.resumed is None:
            self._begin(strategy, datamodule, experience)
        else:
            self._go_on(strategy, datamodule, experience)
        if next_phase != "testing":
            self.fit(strategy, datamodule=datamodule)
            self._reached("testing")

    def _begin(self, strategy: Strategy, datamodule: StreamDataModule, experience: Experience) -> None:
        """Make ``strategy`` ready for a new experience."""
        self.seconds = {}
        # Seeding every experience anew makes it independent of how many numbers the ones before it drew, and
        # gives all strategies the same head to start from.
        entropy = np.random.SeedSequence([datamodule.seed, experience.index])
        seed_everything(int(entropy.generate_state(1)[0]), verbose=False)
        # Where there are several processes, Lightning would seed again by this, after the strategy has drawn.
        del os.environ["PL_GLOBAL_SEED"]
        strategy.expand(experience)
        datamodule.enter(experience)
        self.fit_loop.epoch_progress.reset()
        self.fit_loop.max_epochs = self._epochs if strategy.trains else 0
        self._reached("expanded")

    def _go_on(self, strategy: Strategy, datamodule: StreamDataModule, experience: Experience) -> None:
        """Bring everything to where an earlier attempt was cut off within ``experience``."""
        assert self._continuation is not None
        stream = _experiences(datamodule, self.result.regime)
        resumed = self._continuation.take_up(stream[: experience.index + 1])
        datamodule.enter(experience)
        self.seconds, self._trainable = dict(resumed.seconds), resumed.trainable
        self.fit_loop.max_epochs = self._epochs if strategy.trains else 0
        if resumed.phase == "merging":
            progress.skip_epochs(self)
        elif resumed.phase != "training":  # where there are optimizers, the rest waits for them
            self._continuation.arrive()

    def _arrive(self) -> None:
        assert self._continuation is not None
        self._continuation.arrive()

    def _step(self, stepping: bool) -> None:
        """Take note that the steps of an experience begin or end; a signal waits for the end of one."""
        self._stepping = stepping
        if self._continuation is not None:
            self._continuation.interruption.deferred = stepping

    @contextmanager
    def _batch_size_said(self, datamodule: StreamDataModule) -> Iterator[None]:
        """Let an error of full memory say which batch size asked for it."""
        try:
            yield
        except Exception as error:
            if not is_of_memory(error):
                raise
            name = "batch_size" if self._stepping else "test_batch_size"
            raise OutOfMemory(
                f"A batch of {getattr(datamodule, name)} images does not fit into the memory of "
                f"{self.strategy.root_device}: lower --data.{name}."
            ) from error

    @property
    def _next_phase(self) -> Phase:
        """What comes next in the experience at hand."""
        return "expanded" if self._continuation is None else self._continuation.phase

    def _reached(self, phase: Phase, *, batches: int = 0) -> None:
        """Write down that ``phase`` comes next, and end here if that was asked."""
        continuation = self._continuation
        if continuation is None:
            return
        with self.phase("checkpoints"):
            epoch = self.current_epoch if phase == "training" else 0
            continuation.write(phase, self.seconds, self._trainable, epoch=epoch, batches=batches)
        continuation.heed()

    def _evaluate(self, strategy: Strategy, datamodule: StreamDataModule, result: Result) -> None:
        with self.phase("evaluation"):
            self.test(strategy, datamodule=datamodule, verbose=False)
        result.costs.append(Cost(self.seconds, self._trainable, strategy.stored_bytes, self._peak_memory()))

    def _peak_memory(self) -> int:
        device = self.strategy.root_device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def _blank_result(
        self,
        strategy: Strategy,
        datamodule: StreamDataModule,
        regime: Regime,
        config: dict[str, Any],
        setting: str | None,
    ) -> Result:
        experiences = datamodule.experiences
        return Result(
            strategy=_title(strategy, regime),
            dataset=datamodule.name,
            experiences=[(experience.classes.start, experience.classes.stop) for experience in experiences],
            class_names=list(datamodule.class_names),
            test_images=list(datamodule.test_images),
            order=datamodule.order_name,
            seed=datamodule.seed,
            regime=regime,
            protocol=self.protocol(strategy, datamodule),
            config=config,
            setting=setting,
            provenance=provenance(self.strategy.root_device)
            | {"images_sha256": datamodule.images_sha256, "processes": self.world_size},
            domains=datamodule.domains,
            domain_images=datamodule.domain_images,
        )


class _Lifecycle(Callback):
    """Calls the hooks around training, on the device, without gradients, and counts their seconds.

    Args:
        guard: Asked before a checkpoint inside training, so that none follows a loss that is not finite.
    """

    def __init__(self, guard: DivergenceGuard) -> None:
        self._guard = guard

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Without an epoch to run, Lightning skips the loop and its hooks; the data must still be measured.
        if progress.no_epoch_left(trainer):
            self.on_train_start(trainer, pl_module)
            self.on_train_end(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = _strategy(pl_module)
        assert isinstance(trainer, StreamTrainer)
        if trainer._next_phase == "expanded":
            with _measuring(trainer, strategy):
                agree(strategy)
                data = _DataPasses(trainer, before=True)
                strategy.start_head(data)
                strategy.before_training(data)
                agree(strategy)
            trainer._trainable = strategy.trainable_parameters
            trainer._reached("training")
        elif trainer._next_phase == "training":
            trainer._arrive()
        trainer._step(True)
        self._since = trainer._now()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(trainer, StreamTrainer)
        if trainer.current_epoch and trainer._continuation is not None and trainer._continuation.due:
            self._pause(trainer, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(trainer, StreamTrainer)
        continuation, loop = trainer._continuation, trainer.fit_loop.epoch_loop
        asked = continuation is not None and continuation.asked
        # At the end of an epoch it waits for the next, or for the pass after training.
        if asked and not (loop.batch_progress.is_last_batch or loop._should_accumulate()):
            self._pause(trainer, batch_idx + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = _strategy(pl_module)
        assert isinstance(trainer, StreamTrainer)
        trainer._step(False)
        if trainer._next_phase == "merging":
            trainer._arrive()
        else:
            self._count(trainer)
            trainer._reached("merging")
        with _measuring(trainer, strategy):
            strategy.after_training(_DataPasses(trainer, before=False))
            agree(strategy)

    def _pause(self, trainer: StreamTrainer, batches: int) -> None:
        """Write a checkpoint between two steps."""
        self._guard.look_back(trainer)
        self._count(trainer)
        trainer._reached("training", batches=batches)
        self._since = trainer._now()

    def _count(self, trainer: StreamTrainer) -> None:
        """Add to the seconds of training those since it began, or since the last checkpoint in it."""
        before = trainer.seconds.get("training", 0.0)
        trainer.seconds["training"] = before + trainer._now() - self._since


class _DataPasses:
    """The training images of the experience at hand, batch by batch on the strategy's device."""

    def __init__(self, trainer: StreamTrainer, *, before: bool) -> None:
        self._trainer = trainer
        self._before = before

    def augmented(self) -> Iterator[Batch]:
        """Yield every training image once, drawn as in training."""
        return self._trainer.on_device(self._datamodule.augmented_dataloader(0 if self._before else 1))

    def plain(self) -> Iterator[Batch]:
        """Yield every training image once, transformed as at test time."""
        return self._trainer.on_device(self._datamodule.plain_dataloader())

    @property
    def _datamodule(self) -> StreamDataModule:
        datamodule = self._trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(datamodule, StreamDataModule)
        return datamodule


@contextmanager
def _measuring(trainer: Trainer, strategy: Strategy) -> Iterator[None]:
    """No gradients, layers in evaluation mode; seconds count as data passes."""
    assert isinstance(trainer, StreamTrainer)
    modes = [(module, module.training) for module in strategy.modules()]
    strategy.eval()
    try:
        with trainer.phase("data_passes"), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _title(strategy: Strategy, regime: Regime) -> str:
    """Return what tables call the strategy; variants do not differ over one experience of all classes."""
    variant = "joint" if regime == "joint" else strategy.variant
    return strategy.name if variant is None else f"{strategy.name} ({variant})"


def _strategy(module: LightningModule) -> Strategy:
    assert isinstance(module, Strategy)
    return module


def _experiences(datamodule: StreamDataModule, regime: Regime) -> list[Experience]:
    if regime == "joint":
        return [Experience(0, 1, range(datamodule.experiences[-1].classes.stop))]
    return list(datamodule.experiences)


def _require_equal_image_size(strategy: Strategy, datamodule: StreamDataModule) -> None:
    expected, given = strategy.backbone.image_size, datamodule.image_size
    if expected != given:
        raise ValueError(
            f"The backbone takes images of {expected} pixels and the datamodule gives {given}: "
            f"set --data.image_size {expected}, or choose another backbone."
        )


def _save(result: Result, folder: Path | None) -> None:
    if folder is not None:
        result.write(folder)
