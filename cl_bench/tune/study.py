"""A study: which trials a method gets, proposed by Optuna generation by generation.

A study keeps no state on disk but its trials, which are cells. A study that was killed is repeated from the
beginning: the seeded sampler proposes the same trials, and those that have ended are read instead of run. For
that to hold, a generation has a fixed size, its trials are proposed before any of them runs, and their scores
reach the sampler in the order of their numbers, however many run at a time and whichever ends first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState

from cl_bench.errors import suggestion
from cl_bench.grid.cells import Cell
from cl_bench.results.files import file_name
from cl_bench.results.metrics import BOUNDS, DEFINITIONS, HIGHER_IS_BETTER
from cl_bench.results.result import digest
from cl_bench.results.tuning import Sensitivity, Tuning, read
from cl_bench.run.configs import words
from cl_bench.run.configuration import Configuration
from cl_bench.run.run import finished, images_now, require_same_images
from cl_bench.tune.space import Space, Value, rounded
from cl_bench.tune.trials import Bound, Score, Trial

TRIALS_FOLDER = ".trials"
"""Folder of the trials in the folder of all results; reports do not look into it."""

FIRST = "first:3"
"""The experiences that trials learn unless others are asked for."""

FACTORS = (0.3, 1.0, 3.0)
"""By what the tuned learning rate is multiplied to see how much depends on it."""

_METRIC = "maa/sample"
_VAL_FRACTION = 0.2
_SHORT = {"MAA": "maa/sample", "ACC": "acc/sample"}

_GENERATION = 4
_HOPELESS = 3 * _GENERATION  # trials, none of which had a finite loss
_PRUNED_AFTER = 2  # experiences
_FAR_BEHIND = 0.25  # a trial below this quantile of the earlier ones


@dataclass(frozen=True)
class Plan:
    """What a study is asked to do.

    Attributes:
        strategy: Config stem or path.
        dataset: Config stem or path.
        space: What may be varied.
        unit: What the budget is counted in.
        budget: The budget; no generation of trials starts once it is spent.
        on: ``first:k`` for the first k experiences, or ``all``.
        results: Folder of all results.
        metric: The score, a key of :data:`cl_bench.results.metrics.DEFINITIONS`.
        fixed: Words of every trial.
        val_fraction: Share of the training images of each class on which trials are scored.
        seed: Seed of the sampler and of the trials.
        order: Class order of the trials.
        sensitivity: Whether to try the best settings at other learning rates afterwards.
        wandb: Whether every trial also logs to Weights & Biases, in a group of the study.
        setting: Name of the setting of the strategy that is tuned, if it has several.
    """

    strategy: str
    dataset: str
    space: Space
    unit: str
    budget: float
    on: str
    results: Path
    metric: str = _METRIC
    fixed: tuple[str, ...] = ()
    val_fraction: float = _VAL_FRACTION
    seed: int = 0
    order: str | list[int] = "identity"
    sensitivity: bool = False
    wandb: bool = False
    setting: str = ""

    def __post_init__(self) -> None:
        """Refuse what no study can do, and write out a short name of the metric."""
        object.__setattr__(self, "metric", _SHORT.get(self.metric, self.metric))
        if self.metric not in DEFINITIONS:
            raise ValueError(f"The metric {self.metric!r} is unknown. {suggestion(self.metric, DEFINITIONS)}")
        kind, _, number = self.on.partition(":")
        if not (self.on == "all" or (kind == "first" and number.isdecimal() and int(number))):
            raise ValueError(
                f"A study cannot look at {self.on!r}: write first:3 for the first three experiences, or all, "
                "which looks into the future."
            )
        if not self.budget > 0:
            raise ValueError(f"A budget cannot be {self.budget:g} {self.unit}: give a number above 0.")
        if not 0 < self.val_fraction < 1:
            raise ValueError(
                f"val_fraction cannot be {self.val_fraction:g}: a study needs a share of the training images "
                "between 0 and 1 to score its trials."
            )

    @property
    def first(self) -> int | None:
        """Number of experiences that the trials learn; None for all."""
        return None if self.on == "all" else int(self.on.partition(":")[2])

    @property
    def name(self) -> str:
        """Name of the study and its record, with a hash of what is set other than space and budget."""
        fixed = [word for word in self.fixed if not word.startswith(("--root=", "--data.root="))]
        asked = [fixed, self.on, self.metric, self.val_fraction, self.seed, self.order]
        usual = [[], FIRST, _METRIC, _VAL_FRACTION, 0, "identity"]
        parts = stem(self.strategy), self.setting, stem(self.dataset), digest(asked) if asked != usual else ""
        return file_name("-".join(part for part in parts if part))

    @property
    def record(self) -> Path:
        """File of the record."""
        return self.results / "tuning" / f"{self.name}.json"

    @property
    def question(self) -> dict[str, Any]:
        """What its record is an answer to."""
        return {
            "strategy": self.strategy,
            "dataset": self.dataset,
            "space": self.space.content,
            "budget": {self.unit: float(self.budget)},
            "on": self.on,
            "metric": self.metric,
            "val_fraction": self.val_fraction,
            "seed": self.seed,
            "order": self.order,
            "fixed": list(self.fixed),
        }

    @property
    def is_recorded(self) -> bool:
        """Whether there is a record of exactly this study."""
        if not self.record.is_file():
            return False
        record = read(self.record)
        return all(getattr(record, key) == value for key, value in self.question.items())

    def cell(self, settings: Mapping[str, Value]) -> Cell:
        """Return the trial with ``settings``."""
        first = {} if self.first is None else {"first_experiences": self.first}
        own = first | {
            "val_fraction": self.val_fraction,
            "order": self.order,
            "seed": self.seed,
            "results": str(self.results / TRIALS_FOLDER),
        }
        own |= {"wandb": True, "wandb_group": f"tuning {self.name}"} if self.wandb else {}
        return Cell(self.strategy, self.dataset, (*self.fixed, *words(settings), *words(own)))


@dataclass
class _Told:
    """A trial and how it ended."""

    settings: Mapping[str, Value]
    score: Score


@dataclass(eq=False)
class Study:
    """Proposes the trials of a plan, and is told how they ended.

    Args:
        plan: What to do.
        base: The configuration of a trial whose settings are as the configs have them.
    """

    plan: Plan
    base: Configuration
    _told: list[_Told] = field(default_factory=list)
    _sensitivity: list[Score] | None = None
    _asked: list[Trial] = field(default_factory=list)
    _handles: list[optuna.Trial | None] = field(default_factory=list)

    def ask(self) -> list[Trial]:
        """Return the next trials; none if the study is over.

        Raises:
            ValueError: If one of them was run on other images than there are now.
        """
        if not self.is_over:
            self._handles, self._asked = [], []
            for _ in range(self._size):
                self._propose()
        else:
            self._asked = [self._trial(settings) for settings in self._at_other_rates]
        for trial in self._asked:
            if (path := finished(trial.configuration)) is not None:
                require_same_images(path, trial.configuration, self._images)
        return self._asked

    def tell(self) -> None:
        """Take in how the trials of the last :meth:`ask` have ended, in their order."""
        scores = [trial.score() for trial in self._asked]
        assert all(scores)
        if self.is_over:
            self._sensitivity = [one for one in scores if one]
            return
        for trial, handle, ended in zip(self._asked, self._handles, scores, strict=True):
            assert ended is not None
            trial.configuration.checkpoints.clear()  # a trial that was stopped leaves some
            if not self.is_over:
                self._told.append(_Told(trial.settings, ended))
                self._pass_on(trial.settings, handle, ended)

    @property
    def is_over(self) -> bool:
        """Whether the budget is spent, the only trial of an empty space has ended, or all trials diverge."""
        if not self.plan.space.settings and self._told:
            return True
        if len(self._told) >= _HOPELESS and all(told.score.value is None for told in self._told):
            return True
        return self.spent[self.plan.unit] >= self.plan.budget

    @property
    def spent(self) -> dict[str, float]:
        """Trials, epochs and seconds so far, without trials that a generation ran beyond the budget."""
        ended = [told.score for told in self._told]
        epochs, seconds = sum(one.epochs for one in ended), sum(one.seconds for one in ended)
        return {"trials": len(ended), "epochs": epochs, "seconds": round(seconds, 1)}

    def tuning(self) -> Tuning | None:
        """Return the record of a study that is over; None if no trial was completed with a finite loss."""
        plan, ranking = self.plan, self._ranking
        if not ranking:
            return None
        ended = [told.score for told in self._told]
        sensitivity = None
        if self._sensitivity and plan.space.rate:
            scores = [one.value for one in self._sensitivity]
            sensitivity = Sensitivity(plan.space.rate, list(FACTORS), scores)
        return Tuning(
            **plan.question,
            settings={
                setting.key: [told.settings.get(setting.key) for told in self._told]
                for setting in plan.space.settings
            },
            scores=[one.value for one in ended],
            experiences=[one.experiences for one in ended],
            spent=self.spent,
            best=ranking[0],
            runner_up=ranking[1] if len(ranking) > 1 else None,
            sensitivity=sensitivity,
            importance=self._importance,
        )

    @property
    def _at_other_rates(self) -> list[dict[str, Value]]:
        """The best settings at other learning rates, if they are asked for and there is such a rate."""
        rate, ranking = self.plan.space.rate, self._ranking
        if not self.plan.sensitivity or self._sensitivity is not None or rate is None or not ranking:
            return []
        best = self._told[ranking[0]].settings
        if rate not in best:
            return []
        return [{**best, rate: rounded(float(best[rate]) * factor)} for factor in FACTORS]

    @property
    def _importance(self) -> dict[str, float]:
        completed = self._optuna.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        if len({trial.value for trial in completed}) < 2:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self.plan.seed)
        return optuna.importance.get_param_importances(self._optuna, evaluator=evaluator)

    @property
    def _ranking(self) -> list[int]:
        """Indices of the completed trials, best first, and the earliest first of equals."""
        completed = [
            (index, told.score.value)
            for index, told in enumerate(self._told)
            if not told.score.pruned and told.score.value is not None
        ]
        sign = -1 if self._higher else 1
        return [index for index, value in sorted(completed, key=lambda one: sign * one[1])]

    @property
    def _higher(self) -> bool:
        return HIGHER_IS_BETTER[self.plan.metric]

    @property
    def _size(self) -> int:
        left = self.plan.budget - len(self._told) if self.plan.unit == "trials" else _GENERATION
        return int(min(_GENERATION, left)) if self.plan.space.settings else 1

    def _propose(self) -> None:
        """Add a trial to the generation; the first of a study has the settings of the configs."""
        if not self._told and not self._asked:
            handle, settings = None, self._configured
        else:
            handle = self._optuna.ask()
            settings = self.plan.space.drawn(handle)
        self._handles.append(handle)
        self._asked.append(self._trial(settings))

    def _trial(self, settings: Mapping[str, Value]) -> Trial:
        cell = self.plan.cell(settings)
        configuration = self.base.overridden(words(settings))
        metric = self.plan.metric
        return Trial(cell, configuration, settings=settings, metric=metric, bound=self._bound)

    @property
    def _bound(self) -> Bound | None:
        """The bound of the next generation; None if too few trials have ended, or none can be cut short."""
        length = self.base.datamodule.stream_length
        scores = [told.score.by_experience[_PRUNED_AFTER - 1 : _PRUNED_AFTER] for told in self._told]
        earlier = [value for (value,) in filter(None, scores) if not math.isnan(value)]
        is_joint = self.base.namespace.regime == "joint"
        if self.is_over or is_joint or length <= _PRUNED_AFTER or len(earlier) < _GENERATION:
            return None
        worst = np.quantile(earlier, _FAR_BEHIND if self._higher else 1 - _FAR_BEHIND)
        return Bound(self.plan.metric, _PRUNED_AFTER, float(worst))

    @cached_property
    def _images(self) -> dict[str, str]:
        return images_now(self.base)

    @cached_property
    def _configured(self) -> dict[str, Value]:
        """The settings that the configs have, as far as they set those of the space."""
        found: dict[str, Value] = {}
        for setting in self.plan.space.settings:
            value = configured(self.base, setting.key)
            if value is not None and setting.applies(found):
                found[setting.key] = value
        return found

    @cached_property
    def _optuna(self) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=self.plan.seed, n_startup_trials=_GENERATION)
        return optuna.create_study(direction="maximize" if self._higher else "minimize", sampler=sampler)

    def _pass_on(self, settings: Mapping[str, Value], handle: optuna.Trial | None, ended: Score) -> None:
        """Tell Optuna how a trial ended; a loss that was not finite counts as the worst score."""
        worst = BOUNDS[self.plan.metric][0 if self._higher else 1]
        value = worst if ended.value is None else ended.value
        if handle is None:
            applying = [one for one in self.plan.space.settings if one.applies(settings)]
            if all(one.holds(settings.get(one.key)) for one in applying):  # otherwise it is outside the space
                distributions = {one.key: one.distribution for one in applying}
                self._optuna.add_trial(
                    optuna.trial.create_trial(
                        params={key: settings[key] for key in distributions},
                        distributions=distributions,
                        value=value,
                    )
                )
        elif ended.pruned:
            handle.report(value, step=ended.experiences)
            self._optuna.tell(handle, state=TrialState.PRUNED)
        else:
            self._optuna.tell(handle, value)


def stem(name: str) -> str:
    """Return the stem of a config, given its stem or path."""
    return Path(name).stem


def configured(configuration: Configuration, key: str) -> Any:
    """Return the value of a setting, such as ``optimizer.lr``; None if it has none.

    Raises:
        ValueError: If there is no such setting.
    """
    value: Any = configuration.namespace
    for part in configuration.schema.full_key(key).split("."):
        value = value.get("init_args", value) if hasattr(value, "get") else None
        value = value.get(part) if hasattr(value, "get") else None
    return value


def studies(plans: Sequence[Plan]) -> list[Study]:
    """Return the studies of ``plans``.

    Raises:
        ValueError: If a plan does not fit its strategy and dataset.
        FileNotFoundError: If a config does not exist.
    """
    found = [Study(plan, plan.cell({}).configuration()) for plan in plans]
    for study in found:
        _require_defined(study)
    return found


def _require_defined(study: Study) -> None:
    """Check that the score will be defined: forgetting and backward transfer need two evaluations.

    Raises:
        ValueError: If not.
    """
    metric, base = study.plan.metric, study.base
    evaluations = 1 if base.namespace.regime == "joint" else base.datamodule.stream_length
    if metric.startswith(("bwt/", "forgetting/")) and evaluations < 2:
        raise ValueError(
            f"{metric} needs two evaluations, and a trial of {study.plan.strategy} has one: choose another "
            "metric, or more experiences."
        )
