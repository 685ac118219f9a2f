"""Checkpoints at every turn of a run: one that was cut off resumes as if nothing had happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch
from lightning.pytorch import Trainer

from cl_bench.contracts.strategy import Strategy
from cl_bench.data.experience import Experience
from cl_bench.loop import progress
from cl_bench.loop.checkpoint import Checkpoint, Checkpoints, Owner
from cl_bench.loop.course import Course, Diverged, Phase
from cl_bench.loop.provenance import circumstances, recorded_hashes
from cl_bench.loop.snapshot import (
    Pretrained,
    own_share,
    random_states,
    restore,
    set_random_states,
    snapshot,
    take_share,
)
from cl_bench.processes.ranks import anywhere, is_first, of_all, of_first, place
from cl_bench.results.result import Cost, Result, Row

_KEPT = "kept"  # the optimizer of the stream, if it is not part of the training state


class Continuation:
    """Writes checkpoints of a run, and resumes from the last one of an earlier attempt.

    Args:
        trainer: The trainer of the run.
        strategy: The method, freshly built.
        result: The result of the run, still blank.
        checkpoints: Where checkpoints are kept. Without them or a result, nothing is written or resumed.

    Attributes:
        resumed: The checkpoint to resume from, until everything in it is restored.

    Raises:
        Refused: If the last checkpoint belongs to another run, or cannot be read without running code.
    """

    def __init__(
        self,
        trainer: Trainer,
        strategy: Strategy,
        result: Result | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.resumed: Checkpoint | None = None
        self._trainer = trainer
        self._strategy = strategy
        self._result = result
        self._checkpoints = checkpoints
        if checkpoints is None or result is None:
            return
        class_ = type(strategy)
        self._owner = Owner(
            checkpoints.cell,
            f"{class_.__module__}.{class_.__qualname__}",
            strategy.backbone.weights_sha256,
            recorded_hashes(result),
        )
        self._circumstances = circumstances(result.provenance)
        self._pretrained = Pretrained(strategy)
        self.resumed, damaged = of_first(lambda: checkpoints.latest(self._owner))
        _recall(result, self.resumed, self._circumstances, damaged)

    def due(self, course: Course) -> bool:
        """Whether the end of an epoch should write a checkpoint, on all processes."""
        return self._checkpoints is not None and anywhere(
            (is_first() and self._checkpoints.due) or course.interruption.requested
        )

    def requested(self, course: Course) -> bool:
        """Whether a signal asked the run to end, on any of its processes."""
        return anywhere(course.interruption.requested)

    def reached(self, course: Course, phase: Phase, epoch: int = 0, batches: int = 0) -> None:
        """Note that ``phase`` comes next, write a checkpoint, and end the run if a signal asked for it.

        Args:
            course: Where the run stands.
            phase: What comes next.
            epoch: Epochs of the experience that are done, if a training step comes next.
            batches: Batches of the next epoch that are done.

        Raises:
            Interrupted: If a signal asked for it, on all processes.
            Diverged: If a trained parameter is not finite: the checkpoint before stays the last good one.
            OSError: If the checkpoint cannot be written; the one before is kept.
        """
        course.phase, course.epoch, course.batches = phase, epoch, batches
        with course.timed("checkpoints"):
            self.write(course)
        course.interruption.requested = anywhere(course.interruption.requested)
        course.interruption.raise_if_requested()

    def write(self, course: Course) -> None:
        """Write a checkpoint of the run as it stands on ``course``.

        Raises:
            Diverged: If a trained parameter is not finite: the checkpoint before stays the last good one.
            OSError: If the checkpoint cannot be written; the one before is kept.
        """
        trainer, result = self._trainer, self._result
        if self._checkpoints is None or result is None:
            return
        self._require_finite(course.experience)
        random = of_all(random_states(course.device))
        shares = of_all(own_share(self._strategy))
        if not is_first():
            return
        checkpoint = Checkpoint(
            owner=self._owner,
            phase=course.phase,
            experience=course.experience.index,
            epoch=course.epoch,
            batches=course.batches,
            circumstances=self._circumstances,
            strategy=snapshot(self._strategy, self._pretrained),
            random=random,
            shares=shares[1:],
            loops=progress.loops(trainer),
            training=self._training(course),
            callbacks={
                callback.state_key: state
                for callback in trainer.callbacks  # type: ignore[attr-defined]
                if (state := callback.state_dict())
            },
            result={
                "rows": [None if row is None else asdict(row) for row in result.rows],
                "costs": [asdict(cost) for cost in result.costs],
                "diagnostics": result.diagnostics,
                "resumed": result.provenance.get("resumed", []),
            },
            seconds=dict(course.seconds),
            trainable=course.trainable,
        )
        self._checkpoints.write(checkpoint)

    def restore(self, course: Course, experiences: Sequence[Experience]) -> None:
        """Restore strategy, counters, callbacks and ``course`` from the checkpoint, outside of a fit.

        Optimizers and random states wait for :meth:`restore_states`.

        Args:
            course: Where the run stands; afterwards, where the earlier attempt stood.
            experiences: The stream up to the experience at hand.
        """
        resumed, strategy = self.resumed, self._strategy
        assert resumed is not None
        for experience in experiences:
            strategy.expand(experience)
            # Each fit extended the optimizer of the stream; the last one is yet to come, unless it is done.
            done = experience is not experiences[-1] or resumed.phase == "testing"
            if done and strategy.optimizer_scope == "stream":
                strategy.configure_optimizers()
        restore(strategy, resumed.strategy)
        take_share(strategy, resumed.shares)
        progress.restore_loops(self._trainer, resumed.loops, inside=bool(resumed.batches))
        for callback in self._trainer.callbacks:  # type: ignore[attr-defined]
            if callback.state_key in resumed.callbacks:
                callback.load_state_dict(resumed.callbacks[callback.state_key])
        course.begin(experiences[-1])
        course.phase, course.epoch, course.batches = resumed.phase, resumed.epoch, resumed.batches
        course.seconds, course.trainable = dict(resumed.seconds), resumed.trainable

    def restore_states(self) -> None:
        """Restore optimizers and random states; the run continues from here.

        Steps, and the pass after them, continue inside a fit, which has built the optimizers.
        """
        resumed, kept = self.resumed, self._strategy.kept_optimizer
        if resumed is None:
            return
        if resumed.phase == "training":
            progress.restore_training(self._trainer, resumed.training, resumed.batches)
        elif kept is not None and resumed.training:
            self._strategy.to(self._trainer.strategy.root_device)  # the state of an optimizer follows them
            kept.load_state_dict(resumed.training[_KEPT])
        rank, _ = place()
        state = resumed.random[rank % len(resumed.random)]
        set_random_states(state, self._trainer.strategy.root_device)
        self.resumed = None

    def clear(self) -> None:
        """Remove the checkpoints of a run that is done."""
        if self._checkpoints is not None and is_first():
            self._checkpoints.clear()

    @property
    def last_good(self) -> str:
        """Where the last checkpoint is, as the end of a sentence; empty if there is none."""
        last = None if self._checkpoints is None else self._checkpoints.last
        return f" The last good checkpoint is {last}." if last else ""

    def _training(self, course: Course) -> dict[str, Any]:
        if course.phase == "training":
            return progress.training(self._trainer)
        kept = self._strategy.kept_optimizer
        return {} if kept is None else {_KEPT: kept.state_dict()}

    def _require_finite(self, experience: Experience) -> None:
        finite = [p.detach().isfinite().all() for p in self._strategy.parameters() if p.requires_grad]
        if finite and not bool(torch.stack(finite).all()):
            raise Diverged.at(
                f"A trained parameter is not finite in experience {experience.index + 1}, at step "
                f"{self._trainer.global_step}"
            )


def _recall(
    result: Result, resumed: Checkpoint | None, circumstances: dict[str, Any], damaged: list[str]
) -> None:
    """Put into ``result`` what the earlier attempt found, and what differs from it."""
    if resumed is None:
        if damaged:
            result.provenance["resumed"] = [_resumption("the start", {}, damaged)]
        return
    saved = resumed.result
    result.rows = [None if row is None else Row(**row) for row in saved["rows"]]
    result.costs = [Cost(**cost) for cost in saved["costs"]]
    result.diagnostics = saved["diagnostics"]
    now = _resumption(resumed.place, resumed.differences(circumstances), damaged)
    result.provenance["resumed"] = [*saved["resumed"], now]


def _resumption(place: str, differs: dict[str, list[Any]], damaged: list[str]) -> dict[str, Any]:
    return {
        "from": place,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "differs": differs,
        "damaged": damaged,
    }


def resumption(result: Result) -> str | None:
    """Return where the run resumed, and what differs since, in one line; None if it ran in one go."""
    resumed: list[dict[str, Any]] = result.provenance.get("resumed", [])
    if not resumed:
        return None
    line = f"resumes from a checkpoint: {resumed[-1]['from']}"
    if damaged := resumed[-1]["damaged"]:
        line = (
            f"resumes from {resumed[-1]['from']}, because these checkpoints are damaged: {', '.join(damaged)}"
        )
    differs = resumed[-1]["differs"]
    if not differs:
        return line
    words = ", ".join(f"{name} {was} then and {now} now" for name, (was, now) in differs.items())
    return f"{line}\nwarning: the result may differ in bits from a run in one go: {words}"
