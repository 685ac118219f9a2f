"""How settings were chosen: the record that ``cl-bench tune`` writes and every tuned result contains."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter

from cl_bench.results import fields
from cl_bench.results.fields import MOST_BYTES, Name, Number, Seed, Whole, parsed, validated
from cl_bench.results.files import replaced

_MOST_TRIALS = 10_000

_PerTrial = Field(max_length=_MOST_TRIALS)


@dataclass
class Sensitivity:
    """Scores with the tuned learning rate multiplied by some factors.

    Attributes:
        key: The setting that is the learning rate.
        factors: What it is multiplied by.
        scores: The score with each; None if the loss was not finite.
    """

    key: Name
    factors: Annotated[list[Number], Field(max_length=100)]
    scores: Annotated[list[Number | None], Field(max_length=100)]


@dataclass
class Tuning:
    """A study: what was tried, how it was scored, and what is best.

    Attributes:
        strategy: Config stem or path of the method.
        dataset: Config stem or path of the dataset.
        space: What each setting may be, as in ``configs/spaces``.
        budget: What the study could spend: ``trials``, ``epochs`` or ``seconds``.
        on: Which experiences the trials learnt: ``first:k``, or ``all``, which looks into the future.
        metric: Name of the score, a key of :data:`cl_bench.results.metrics.DEFINITIONS`.
        val_fraction: Share of the training images of each class on which trials were scored.
        seed: Seed of the sampler and of the trials.
        order: Class order of the trials.
        fixed: Options of every trial that the space does not vary.
        settings: The values of each setting, one for each trial; None if the trial does not have it.
        scores: The score of each trial; None if the loss was not finite.
        experiences: Number of experiences that each trial learnt; a pruned one has fewer, and its score is
            that after the last of them.
        spent: Trials, epochs and seconds of them all.
        best: Index of the best trial.
        runner_up: Index of the second best; None if no other was completed.
        sensitivity: What becomes of the best trial at other learning rates; None if it was not measured.
        importance: Share of the variance of the scores that each setting explains, by Optuna's functional
            ANOVA; empty if the scores do not vary.
    """

    strategy: Name
    dataset: Name
    space: dict[Name, dict[str, Any]]
    budget: Annotated[dict[Name, Number], Field(max_length=3)]
    on: Name
    metric: Name
    val_fraction: Number
    seed: Seed
    order: Name | list[Whole]
    fixed: Annotated[list[str], Field(max_length=1_000)]
    settings: Annotated[
        dict[Name, Annotated[list[Any], Field(max_length=_MOST_TRIALS)]], Field(max_length=100)
    ]
    scores: Annotated[list[Number | None], _PerTrial]
    experiences: Annotated[list[Whole], _PerTrial]
    spent: Annotated[dict[Name, Number], Field(max_length=3)]
    best: Whole
    runner_up: Whole | None = None
    sensitivity: Sensitivity | None = None
    importance: Annotated[dict[Name, Number], Field(max_length=100)] = field(default_factory=dict)

    @property
    def chosen(self) -> dict[str, Any]:
        """The settings of the best trial, by key."""
        return self.settings_of(self.best)

    @property
    def summary(self) -> dict[str, Any]:
        """What the cell of a tuned run holds of its study; the scores are not part of it."""
        return {"budget": self.budget, "on": self.on, "metric": self.metric}

    def settings_of(self, trial: int) -> dict[str, Any]:
        """Return the settings of a trial by key, without those that it does not have."""
        return {key: values[trial] for key, values in self.settings.items() if values[trial] is not None}

    def write(self, path: Path) -> None:
        """Write the record, atomically.

        Raises:
            OSError: If it cannot be written; the old file is kept.
        """
        with replaced(path) as file:
            file.write(json.dumps(asdict(self), indent=1).encode())


def read(path: Path) -> Tuning:
    """Read a record.

    Raises:
        ValueError: If the file is not a record of a study.
        FileNotFoundError: If it does not exist.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no record of a tuning {path}: run cl-bench tune first.")
    try:
        with path.open("rb") as file:
            return from_plain(parsed(file.read(MOST_BYTES)))
    except ValueError as error:
        raise ValueError(f"{path} is not a record of cl-bench tune: {error}.") from error


def from_plain(value: object) -> Tuning:
    """Return the record that plain JSON describes.

    Raises:
        ValueError: If it describes none.
    """
    found: Tuning = validated(_adapter(), value)
    trials = len(found.scores)
    if not all(len(column) == trials for column in (found.experiences, *found.settings.values())):
        raise ValueError(f"a setting does not have a value for each of its {trials} trials")
    measured = found.sensitivity
    if measured is not None and len(measured.scores) != len(measured.factors):
        raise ValueError("its sensitivity does not have a score for each factor")
    if not max(found.best, found.runner_up or 0) < trials or found.scores[found.best] is None:
        raise ValueError(f"its best is not one of its {trials} trials")
    return found


def _with_study(value: dict[str, Any]) -> dict[str, Any]:
    """Require that the study in a provenance is one, if there is any."""
    if "tuning" in value:
        from_plain(value["tuning"])
    return value


Provenance = Annotated[fields.Provenance, AfterValidator(_with_study)]
"""How a result was made, with the study of its settings."""


@cache
def _adapter() -> TypeAdapter[Tuning]:
    return TypeAdapter(Tuning)
