"""The one loop over the experiences of a stream."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.seed import seed_everything
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy as Distribution

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.contracts.strategy import Strategy
from cl_bench.data.experience import Experience
from cl_bench.errors import sentence
from cl_bench.loop import progress
from cl_bench.loop.callbacks import DivergenceGuard, Lifecycle, Once, StreamMetrics, row_of
from cl_bench.loop.checkpoint import Checkpoints
from cl_bench.loop.continuation import Continuation
from cl_bench.loop.course import Course, Diverged, Interrupted, naming_batch_size
from cl_bench.loop.provenance import file_hashes, provenance
from cl_bench.network.heads import TrainableHead
from cl_bench.processes.distributed import Agreement, distribution, launch, require_one_command
from cl_bench.processes.launcher import is_single
from cl_bench.processes.ranks import be_first, failed_first, is_first
from cl_bench.results.result import Cost, Protocol, Regime, Result


class StreamTrainer(Trainer):
    """A Lightning Trainer that walks a stream: one Trainer, one fit and one test for each experience.

    Every argument is Lightning's; some defaults differ because a stream needs them.

    Args:
        callbacks: As in Lightning.
        logger: As in Lightning, off unless given.
        enable_checkpointing: Off: checkpoints of a single fit know nothing of the stream.
        enable_progress_bar: Off: one bar for each fit and test shows little of the stream.
        enable_model_summary: Off.
        use_distributed_sampler: Off: it repeats samples to even out the ranks, and counts would be wrong.
        num_sanity_val_steps: None: nothing is validated.
        devices: One, unless more are asked for.
        strategy: As in Lightning; several processes are ``ddp``.
        check_agreement: Whether every step checks that all processes hold the same parameters, for debugging.
        gradient_clip_val: As in Lightning.
        limit_train_batches: As in Lightning.
        limit_test_batches: Refused if it leaves out test images.
        overfit_batches: As in Lightning.
        kwargs: As in Lightning.

    Attributes:
        course: Where the run stands.
    """

    callbacks: list[Callback]
    fast_dev_run: int | bool

    # Lightning annotates some numbers with typing's unions, whose members change order with the order of
    # imports, so 1 would be read as 1 or as 1.0. The annotations here are read instead.

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
        self._guard = DivergenceGuard()
        if is_single(devices, kwargs.get("num_nodes", 1), strategy):
            be_first()
            kwargs["plugins"] = _without_scheduler(kwargs.get("plugins"))
        super().__init__(
            callbacks=[self._guard, *checks, *given],
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
        progress.leave_signals(self)
        self.course = Course(self.strategy.root_device)
        self._epochs = self.fit_loop.max_epochs
        self._result: Result | None = None

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
        chosen: Mapping[str, Any] = MappingProxyType({}),
        folder: Path | None = None,
        checkpoints: Checkpoints | None = None,
        require: Callable[[], None] = lambda: None,
    ) -> Result:
        """Train and evaluate ``strategy`` on the whole stream of ``datamodule``.

        In a run of several processes, each returns the result and the first writes it.

        Args:
            strategy: The method; it is changed in place.
            datamodule: The stream, with its seed and class order.
            regime: ``sequential``, or ``joint``: one experience of all classes, evaluated per original one.
            config: Resolved config, kept in the result; its hash names the cell.
            setting: Name of the setting, kept in the result.
            chosen: How the settings were chosen, kept in the provenance.
            folder: Where ``result.json`` is rewritten after every experience; nowhere if None.
            checkpoints: Where the run writes checkpoints at every turn, and from where it resumes; they are
                removed when it is done. None writes none.
            require: Called before the result is written; what it raises ends the run and keeps the file.

        Returns:
            The result, with status ``done``.

        Raises:
            ValueError: If the stream or the strategy's parts do not fit together.
            Refused: If there is a checkpoint from which it cannot resume.
            OSError: If result or checkpoint cannot be written; the ones before are still there.
            Diverged: If the loss is no longer finite.
            OutOfMemory: If a batch does not fit into memory.
            KeyboardInterrupt: After Ctrl-C or SIGTERM; the step at hand is finished first.
        """
        self.require_fit(strategy, datamodule, regime)
        result = self._result = self._blank_result(strategy, datamodule, regime, config or {}, setting)
        result.provenance |= chosen
        written = folder if is_first() else None

        def save() -> None:
            if written is not None:
                result.write(written, require)

        launch(self.strategy, lambda: self._run_stream(strategy, datamodule, result, save, checkpoints))
        return result

    def _run_stream(
        self,
        strategy: Strategy,
        datamodule: StreamDataModule,
        result: Result,
        save: Callable[[], None],
        checkpoints: Checkpoints | None,
    ) -> None:
        """Fill ``result``, once all processes of the run have started."""
        course = self.course = Course(self.strategy.root_device)
        if course.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(course.device)
        metrics = StreamMetrics(result)
        once = Once(strategy, datamodule, result, checkpoints.folder if checkpoints else None)
        continuation = Continuation(self, strategy, result, checkpoints)
        save()
        try:
            naming = naming_batch_size(course, datamodule)
            with course.interruption, naming, self._watched(continuation, metrics, once):
                self._walk(continuation, metrics, once, strategy, datamodule, save)
            result.status = "done"
        except BaseException as error:
            # Ctrl-C also kills the processes that load images, which then is not a failure.
            asked = isinstance(error, Interrupted | KeyboardInterrupt)
            asked |= course.interruption.requested and not isinstance(error, Diverged)
            result.status = "diverged" if isinstance(error, Diverged) else "failed"
            own = "Interrupted." if asked else sentence(error)
            result.error = failed_first(own) or own + ("" if asked else continuation.last_good)
            if asked:
                raise KeyboardInterrupt from error
            raise
        finally:
            datamodule.close()
            save()
        continuation.clear()

    @contextmanager
    def _watched(self, continuation: Continuation, *first: Callback) -> Iterator[None]:
        """Let callbacks of a run watch it: the ``first``, and the lifecycle after the guard."""
        before = list(self.callbacks)
        place = before.index(self._guard) + 1
        lifecycle = Lifecycle(self.course, continuation, self._guard)
        self.callbacks = [*first, *before[:place], lifecycle, *before[place:]]
        try:
            yield
        finally:
            self.callbacks = before

    def _walk(
        self,
        continuation: Continuation,
        metrics: StreamMetrics,
        once: Once,
        strategy: Strategy,
        datamodule: StreamDataModule,
        save: Callable[[], None],
    ) -> None:
        """Learn and evaluate one experience after another, from where an earlier attempt stopped."""
        course, result = self.course, metrics.result
        stream = _experiences(datamodule, result.regime)
        start = continuation.resumed.experience if continuation.resumed else 0
        for experience in stream[start:]:
            if continuation.resumed is None:
                self._begin(strategy, datamodule, experience)
                continuation.reached(course, "expanded")
            else:
                self._resume(continuation, strategy, datamodule, stream[: experience.index + 1])
            self._learn(continuation, strategy, datamodule)
            metrics.row = row_of(result, experience)
            with course.timed("evaluation"), once.applied():
                self.test(strategy, datamodule=datamodule, verbose=False)
            peak = self._peak_memory()
            result.costs.append(Cost(course.seconds, course.trainable, strategy.stored_bytes, peak))
            with course.timed("checkpoints"):
                save()

    def require_fit(
        self, strategy: Strategy, datamodule: StreamDataModule, regime: Regime = "sequential"
    ) -> None:
        """Read the data, and check that strategy, stream and trainer go together.

        Args:
            strategy: The method.
            datamodule: The stream.
            regime: As in :meth:`run`.

        Raises:
            ValueError: If they do not.
            FileNotFoundError: If the data are not there.
        """
        datamodule.prepare_data()
        datamodule.setup("fit")
        _require_equal_image_size(strategy, datamodule)
        _require_classes_to_compare(strategy, _experiences(datamodule, regime))
        if strategy.head.num_classes:
            raise ValueError(
                f"This strategy has learnt {strategy.head.num_classes} classes already: "
                "build a new one for a new stream."
            )
        require_one_command(self.strategy, self.world_size)
        self._require_whole_epochs()

    def protocol(self, strategy: Strategy, datamodule: StreamDataModule) -> Protocol:
        """Return what must agree for results of ``strategy`` on ``datamodule`` to be compared with others."""
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
        """Refuse settings that would cut the stream short and leave numbers that look like results."""
        cut_short = {
            "fast_dev_run": bool(self.fast_dev_run),
            "max_steps": self.max_steps != -1,
            "max_time": any(isinstance(callback, Timer) for callback in self.callbacks),
            "max_epochs": self._epochs is None or self._epochs < 0,
        }
        for key, given in cut_short.items():
            if given:
                raise ValueError(
                    f"Every experience is trained for the same whole number of epochs, and {key} would "
                    "change that: give max_epochs, 0 or more."
                )

    def learn(self, strategy: Strategy, datamodule: StreamDataModule, experience: Experience) -> None:
        """Train ``strategy`` on one experience, and evaluate nothing; :meth:`run` does so for all of them.

        Args:
            strategy: The method, as the experience before left it.
            datamodule: The stream, set up; afterwards it serves this experience.
            experience: The next one.
        """
        self.course = Course(self.strategy.root_device)
        continuation = Continuation(self, strategy)
        with self._watched(continuation):
            self._begin(strategy, datamodule, experience)
            self._learn(continuation, strategy, datamodule)

    def _begin(self, strategy: Strategy, datamodule: StreamDataModule, experience: Experience) -> None:
        """Make ``strategy`` ready for a new experience."""
        self.course.begin(experience)
        # Seeding every experience makes it independent of how many numbers earlier ones drew, and gives all
        # strategies the same head to start from.
        entropy = np.random.SeedSequence([datamodule.seed, experience.index])
        seed_everything(int(entropy.generate_state(1)[0]), verbose=False)
        # With several processes, Lightning would seed again by this variable, after the strategy has drawn.
        del os.environ["PL_GLOBAL_SEED"]
        strategy.expand(experience)
        datamodule.enter(experience)
        progress.start_epochs(self, self._epochs if strategy.trains else 0)

    def _resume(
        self,
        continuation: Continuation,
        strategy: Strategy,
        datamodule: StreamDataModule,
        stream: Sequence[Experience],
    ) -> None:
        """Bring everything to where an earlier attempt stopped within the last experience of ``stream``."""
        continuation.restore(self.course, stream)
        datamodule.enter(stream[-1])
        self.fit_loop.max_epochs = self._epochs if strategy.trains else 0
        if self.course.phase == "merging":
            progress.skip_epochs(self)
        elif self.course.phase != "training":
            continuation.restore_states()

    def _learn(self, continuation: Continuation, strategy: Strategy, datamodule: StreamDataModule) -> None:
        """Train on the experience at hand, from the phase that comes next."""
        self.set_precision(strategy)
        if self.course.phase != "testing":
            self.fit(strategy, datamodule=datamodule)
            continuation.reached(self.course, "testing")

    def set_precision(self, strategy: Strategy) -> None:
        """Let the backbone of ``strategy`` compute in the precision of this trainer."""
        on_cpu = self.strategy.root_device.type == "cpu"
        strategy.backbone.compute_in(self.precision_plugin.forward_context)
        strategy.backbone.fuse_attention(not (on_cpu and str(self.precision).startswith("bf16")))

    def _peak_memory(self) -> int:
        if self.course.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.course.device)
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
            | {"images_sha256": datamodule.images_sha256, "processes": self.world_size}
            | file_hashes(datamodule),
            domains=datamodule.domains,
            domain_images=datamodule.domain_images,
            training_data=strategy.promises.training_data,
        )


def _without_scheduler(plugins: Any) -> list[Any]:
    """Return plugins of a trainer with which a single process ignores variables of SLURM and the like."""
    given = list(plugins) if isinstance(plugins, list | tuple) else [] if plugins is None else [plugins]
    chosen = any(isinstance(plugin, ClusterEnvironment) for plugin in given)
    return given if chosen else [*given, LightningEnvironment()]


def _title(strategy: Strategy, regime: Regime) -> str:
    """Return what tables call the strategy; variants do not differ over one experience of all classes."""
    variant = "joint" if regime == "joint" else strategy.variant
    name = type(strategy).name  # by which a finished cell is found before the strategy is built
    return name if variant is None else f"{name} ({variant})"


def _experiences(datamodule: StreamDataModule, regime: Regime) -> list[Experience]:
    if regime == "joint":
        names = tuple(datamodule.class_names)
        return [Experience(0, 1, range(datamodule.experiences[-1].classes.stop), names)]
    return list(datamodule.experiences)


def _require_classes_to_compare(strategy: Strategy, stream: Sequence[Experience]) -> None:
    """Refuse an experience of one class, over which the cross-entropy is zero whatever is learnt."""
    if strategy.loss_over == "seen" or not isinstance(strategy.head, TrainableHead):
        return
    for experience in stream:
        if experience.num_classes == 1:
            raise ValueError(
                f"Experience {experience.index + 1} brings a single class, and {strategy.name} learns to "
                "distinguish the classes of an experience, so it would learn nothing there: choose fewer "
                "experiences, so that each has two classes or more."
            )


def _require_equal_image_size(strategy: Strategy, datamodule: StreamDataModule) -> None:
    expected, given = strategy.backbone.image_size, datamodule.image_size
    if expected != given:
        raise ValueError(
            f"The backbone takes images of {expected} pixels and the datamodule gives {given}: "
            f"set --data.image_size {expected}, or choose another backbone."
        )
