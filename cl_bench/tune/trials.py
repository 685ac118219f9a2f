"""Trials: cells that learn the first experiences, scored on held-out training images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning.pytorch import Callback, LightningModule, Trainer

from cl_bench.grid.command import Entry
from cl_bench.grid.work import Job, Outcome
from cl_bench.results.metrics import HIGHER_IS_BETTER
from cl_bench.results.result import FILE_NAME, Result, read
from cl_bench.run.run import finished
from cl_bench.tune.space import Value


@dataclass(frozen=True)
class Bound:
    """The score below which a trial is far behind after an experience, and stops.

    It is known before the trial starts, so whether the trial stops depends on its own score only, and not on
    which trials happen to run at the same time.

    Attributes:
        metric: Name of the score.
        after: Number of experiences after which it is compared.
        worst: The worst score with which the trial continues.
    """

    metric: str
    after: int
    worst: float

    def __call__(self) -> Callback:
        """Return a callback that stops the trial."""
        return _Pruning(self)

    def stops(self, result: Result) -> bool:
        """Whether the trial with this ``result`` is far behind; False if it is not known yet."""
        if len(result.rows) < self.after:
            return False
        value = score(result, self.metric, self.after)
        return value < self.worst if HIGHER_IS_BETTER[self.metric] else value > self.worst


class _Pruning(Callback):
    def __init__(self, bound: Bound) -> None:
        self._bound = bound

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the score before the next experience.

        Raises:
            RuntimeError: If it is worse than the bound.
        """
        result: Result = trainer.result  # type: ignore[attr-defined]
        bound = self._bound
        if len(result.rows) == bound.after and bound.stops(result):
            raise RuntimeError(
                f"Pruned: {bound.metric} is {score(result, bound.metric, bound.after):.2f} after "
                f"experience {bound.after}, and the trial needs {bound.worst:.2f} to continue."
            )


@dataclass(frozen=True)
class Score:
    """How a trial ended.

    Attributes:
        value: Its score; None if the loss was not finite.
        experiences: Number of experiences that it learnt.
        pruned: Whether it was stopped before the last.
        by_experience: The score after each experience; NaN where the metric is not defined.
        epochs: Number of epochs that it trained, those of all experiences together, with the one in which the
            loss was not finite.
        seconds: Wall-clock seconds.
    """

    value: float | None
    experiences: int
    pruned: bool
    by_experience: tuple[float, ...]
    epochs: int
    seconds: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Trial(Entry):
    """A cell of a study.

    Attributes:
        settings: The settings that the study chose for it.
        metric: Name of the score.
        bound: Stops it if it is far behind; None lets it finish.
    """

    settings: Mapping[str, Value]
    metric: str
    bound: Bound | None = None

    @property
    def title(self) -> str:
        """Strategy and settings in a few words."""
        chosen = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        return f"{self.configuration.folder.parent.name}: {chosen or 'nothing to choose'}"

    def job(self, *, waits: bool) -> Job:
        """As of any cell, with the bound."""
        job = super().job(waits=waits)
        return job if self.bound is None else Job(job.cell, job.folder, job.threads, waits, (self.bound,))

    def error(self, outcome: Outcome) -> str | None:
        """What went wrong; a trial that was pruned, or whose loss was not finite, has ended well."""
        return None if self.score() else super().error(outcome)

    def closing(self) -> str:
        """The score in a few words."""
        ended = self.score()
        assert ended is not None
        if ended.value is None:
            return "the loss was not finite"
        pruned = f", pruned after experience {ended.experiences}" if ended.pruned else ""
        return f"{self.metric} {ended.value:.2f} in {ended.seconds:.0f} s{pruned}"

    def score(self) -> Score | None:
        """Return how the trial ended, from its result file; None if it has not ended.

        A trial that its bound stops counts up to there, also if an earlier study let it finish.
        """
        result = self._result()
        if result is None:
            return None
        pruned = self.bound is not None and self.bound.stops(result)
        if not pruned and result.status not in ("done", "diverged"):
            return None
        learnt = self.bound.after if pruned and self.bound else len(result.rows)
        scores = tuple(
            score(result, self.metric, index + 1) for index in range(learnt) if result.rows[index] is not None
        )
        diverged = not pruned and result.status == "diverged"
        if not diverged and math.isnan(scores[-1]):
            raise ValueError(
                f"{self.metric} is not defined after {learnt} experiences of {result.strategy}: choose "
                "another metric, or more experiences."
            )
        epochs = self.configuration.namespace.trainer.max_epochs
        return Score(
            value=None if diverged else scores[-1],
            experiences=learnt,
            pruned=pruned,
            by_experience=scores,
            epochs=epochs * (learnt + diverged),
            seconds=sum(sum(cost.seconds.values()) for cost in result.costs[:learnt]),
        )

    def _result(self) -> Result | None:
        path = finished(self.configuration) or self.configuration.folder / FILE_NAME
        try:
            result = read(path)
        except (OSError, ValueError):  # it has not run, or an attempt left a damaged file
            return None
        return result if result.cell == self.configuration.hash else None


def score(result: Result, metric: str, experiences: int) -> float:
    """Return a metric as if the stream ended after a number of experiences; NaN if it is not defined there.

    A joint run is evaluated once, so its average over the stream is its final accuracy.
    """
    if result.regime == "joint":
        metric = metric.replace("maa/", "acc/")
    return result.metrics_after(experiences - 1)[metric]
