"""Where a run stands, written down at every turn: if it is cut off, it goes on as if it had not been."""

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
from cl_bench.loop.callbacks import Diverged
from cl_bench.loop.checkpoint import Checkpoint, Checkpoints, Owner, Phase
from cl_bench.loop.interruption import Interruption
from cl_bench.loop.provenance import circumstances
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


class Continuation:
    """Writes checkpoints of a run, and goes on from the last one of an earlier attempt.

    Args:
        trainer: Who trains.
        strategy: The method, freshly built.
        result: The result of the run, still blank.
        checkpoints: Where checkpoints are kept; nothing is written or gone on with if None.

    Attributes:
        resumed: The checkpoint that is gone on with, until its place is reached.
        interruption: What is asked of the run from outside.

    Raises:
        Refused: If the last checkpoint is one of another run, or cannot be read without running code.
    """

    def __init__(
        self, trainer: Trainer, strategy: Strategy, result: Result, checkpoints: Checkpoints | None
    ) -> None:
        self.interruption = Interruption()
        self.resumed: Checkpoint | None = None
        self._trainer = trainer
        self._strategy = strategy
        self._result = result
        self._checkpoints = checkpoints
        if checkpoints is None:
            return
        class_ = type(strategy)
        self._owner = Owner(
            checkpoints.cell, f"{class_.__module__}.{class_.__qualname__}", strategy.backbone.weights_sha256
        )
        self._circumstances = circumstances(result.provenance)
        self._pretrained = Pretrained(strategy)
        self.resumed, damaged = of_first(lambda: checkpoints.latest(self._owner))
        self._recall(self.resumed, damaged)

    @property
    def due(self) -> bool:
        """Whether the end of an epoch should be written down, on all processes."""
        return self._checkpoints is not None and anywhere(
            (is_first() and self._checkpoints.due) or self.interruption.requested
        )

    @property
    def asked(self) -> bool:
        """Whether the run was asked to end, on any of its processes."""
        return anywhere(self.interruption.requested)

    def heed(self) -> None:
        """End the run here if that was asked.

        Raises:
            Interrupted: If so, on all processes.
        """
        self.interruption.requested = self.asked
        self.interruption.heed()

    @property
    def phase(self) -> Phase:
        """What comes next in the experience at hand; ``expanded`` where nothing is gone on with."""
        return "expanded" if self.resumed is None else self.resumed.phase

    def write(
        self,
        phase: Phase,
        seconds: dict[str, float],
        trainable: int,
        *,
        epoch: int = 0,
        batches: int = 0,
    ) -> None:
        """Write down that ``phase`` comes next in the experience at hand.

        Args:
            phase: What comes next.
            seconds: Seconds of the experience so far, by phase.
            trainable: Number of parameters with a gradient.
            epoch: Epochs that are done.
            batches: Batches that are done of the epoch after these.

        Raises:
            Diverged: If a trained parameter is not finite: the checkpoint before stays the last good one.
            OSError: If the checkpoint cannot be written; the one before is still there.
        """
        if self._checkpoints is None:
            return
        self._require_finite()
        random = of_all(random_states(self._trainer.strategy.root_device))
        shares = of_all(own_share(self._strategy))
        if not is_first():
            return
        trainer, result = self._trainer, self._result
        checkpoint = Checkpoint(
            owner=self._owner,
            phase=phase,
            experience=self._strategy.experience.index,
            epoch=epoch,
            batches=batches,
            circumstances=self._circumstances,
            strategy=snapshot(self._strategy, self._pretrained),
            random=random,
            shares=shares[1:],
            loops=progress.loops(trainer),
            training=progress.training(trainer) if phase == "training" else {},
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
            seconds=dict(seconds),
            trainable=trainable,
        )
        self._checkpoints.write(checkpoint)

    def take_up(self, experiences: Sequence[Experience]) -> Checkpoint:
        """Bring strategy, counters and callbacks to where the checkpoint was taken, before a fit.

        Args:
            experiences: The stream up to the experience at hand.
        """
        resumed = self.resumed
        assert resumed is not None
        for experience in experiences:
            self._strategy.expand(experience)
        restore(self._strategy, resumed.strategy)
        take_share(self._strategy, resumed.shares)
        progress.restore_loops(self._trainer, resumed.loops, inside=bool(resumed.batches))
        for callback in self._trainer.callbacks:  # type: ignore[attr-defined]
            if callback.state_key in resumed.callbacks:
                callback.load_state_dict(resumed.callbacks[callback.state_key])
        return resumed

    def arrive(self) -> None:
        """Go on from here: what was drawn and learnt up to the checkpoint has been drawn and learnt."""
        if self.resumed is None:
            return
        if self.resumed.phase == "training":
            progress.restore_training(self._trainer, self.resumed.training, self.resumed.batches)
        rank, _ = place()
        set_random_states(
            self.resumed.random[rank % len(self.resumed.random)], self._trainer.strategy.root_device
        )
        self.resumed = None

    def clear(self) -> None:
        """Remove the checkpoints of a run that is done."""
        if self._checkpoints is not None and is_first():
            self._checkpoints.clear()

    @property
    def last_good(self) -> str:
        """Where the last checkpoint is, as the end of a sentence; nothing where there is none."""
        last = None if self._checkpoints is None else self._checkpoints.last
        return f" The last good checkpoint is {last}." if last else ""

    def _recall(self, resumed: Checkpoint | None, damaged: list[str]) -> None:
        """Take over what the attempt before has found, and say what differs from it."""
        result = self._result
        if resumed is None:
            if damaged:
                result.provenance["resumed"] = [_resumption("the start", {}, damaged)]
            return
        saved = resumed.result
        result.rows = [None if row is None else Row(**row) for row in saved["rows"]]
        result.costs = [Cost(**cost) for cost in saved["costs"]]
        result.diagnostics = saved["diagnostics"]
        result.provenance["resumed"] = [
            *saved["resumed"],
            _resumption(resumed.place, resumed.differences(self._circumstances), damaged),
        ]

    def _require_finite(self) -> None:
        finite = [p.detach().isfinite().all() for p in self._strategy.parameters() if p.requires_grad]
        if finite and not bool(torch.stack(finite).all()):
            raise Diverged.at(
                f"A trained parameter is not finite in experience {self._strategy.experience.index + 1}, at "
                f"step {self._trainer.global_step}"
            )


def _resumption(place: str, differs: dict[str, list[Any]], damaged: list[str]) -> dict[str, Any]:
    return {
        "from": place,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "differs": differs,
        "damaged": damaged,
    }


def resumption(result: Result) -> str | None:
    """Return where the run went on, and what differs since, in one line; None if it ran in one go."""
    resumed: list[dict[str, Any]] = result.provenance.get("resumed", [])
    if not resumed:
        return None
    line = f"goes on from a checkpoint: {resumed[-1]['from']}"
    if damaged := resumed[-1]["damaged"]:
        line = f"goes on from {resumed[-1]['from']}, as these checkpoints are damaged: {', '.join(damaged)}"
    differs = resumed[-1]["differs"]
    if not differs:
        return line
    words = ", ".join(f"{name} {was} then and {now} now" for name, (was, now) in differs.items())
    return f"{line}\nwarning: bits may differ from those of a run in one go, since there were {words}"
