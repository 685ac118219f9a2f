"""Spaces: what each setting of a method may be, read from YAML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial

from cl_bench.errors import suggestion
from cl_bench.run.configs import Config, config_file, load

Value = bool | int | float | str

_KEYS = ("low", "high", "log", "step", "choices", "when")
_FORMS = "write {low: 1e-4, high: 1e-2, log: true}, or {choices: [true, false]}"
_DIGITS = 3  # significant ones of a number drawn from a range


@dataclass(frozen=True)
class Setting:
    """What one setting may be.

    Attributes:
        key: The key, as an option of ``cl-bench run``.
        distribution: Its range or choices.
        when: The values of other settings without which it is left alone.
    """

    key: str
    distribution: BaseDistribution
    when: Mapping[str, Value]

    def applies(self, settings: Mapping[str, Value]) -> bool:
        """Whether a trial with ``settings``, which precede this one, has it."""
        return all(settings.get(key) == value for key, value in self.when.items())

    def drawn(self, trial: Trial) -> Value:
        """Return the value that ``trial`` suggests, a fraction rounded to three significant digits."""
        distribution = self.distribution
        if isinstance(distribution, CategoricalDistribution):
            choice: Value = trial.suggest_categorical(self.key, distribution.choices)  # type: ignore[assignment]
            return choice
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        low, high, log = distribution.low, distribution.high, distribution.log
        if isinstance(distribution, IntDistribution):
            return trial.suggest_int(self.key, low, high, step=distribution.step, log=log)  # type: ignore[arg-type]
        return rounded(trial.suggest_float(self.key, low, high, step=distribution.step, log=log))

    def holds(self, value: object) -> bool:
        """Whether ``value`` is one that it may be.

        A text or None is never inside a range.
        """
        distribution = self.distribution
        if isinstance(distribution, CategoricalDistribution):
            return any(value == choice and type(value) is type(choice) for choice in distribution.choices)
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and distribution.low <= value <= distribution.high  # type: ignore[operator]

    @property
    def ends(self) -> list[Value]:
        """The lowest and the highest value, or all choices."""
        distribution = self.distribution
        if isinstance(distribution, CategoricalDistribution):
            return list(distribution.choices)  # type: ignore[arg-type]
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        return [distribution.low, distribution.high]


@dataclass(frozen=True)
class Space:
    """The settings of a method that a study varies.

    Attributes:
        content: As written.
        settings: Each setting, after those on which it depends.
    """

    content: Config
    settings: tuple[Setting, ...]

    def drawn(self, trial: Trial) -> dict[str, Value]:
        """Return the settings that ``trial`` suggests."""
        settings: dict[str, Value] = {}
        for setting in self.settings:
            if setting.applies(settings):
                settings[setting.key] = setting.drawn(trial)
        return settings

    def corners(self) -> Iterator[dict[str, Value]]:
        """Yield settings until each has been at both ends, or at every choice."""
        for index in range(max((len(setting.ends) for setting in self.settings), default=0)):
            settings: dict[str, Value] = {}
            for setting in self.settings:
                if setting.applies(settings):
                    settings[setting.key] = setting.ends[min(index, len(setting.ends) - 1)]
            yield settings

    @property
    def rate(self) -> str | None:
        """The first setting that is a learning rate."""
        return next((one.key for one in self.settings if one.key.endswith("lr")), None)


def rounded(value: float) -> float:
    """Return ``value`` with three significant digits.

    >>> rounded(0.00123456)
    0.00123
    """
    return float(f"{value:.{_DIGITS}g}")


def read_space(name: str) -> Space:
    """Return the space of this stem under ``configs/spaces``, or of this path.

    Raises:
        ValueError: If the file does not describe a space.
        FileNotFoundError: If it does not exist.
    """
    path = config_file("spaces", name)
    content = load(path)
    try:
        return space_of(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def space_of(content: Config) -> Space:
    """Return the space that ``content`` describes.

    Raises:
        ValueError: If it describes none.
    """
    settings: list[Setting] = []
    for key, given in content.items():
        if not isinstance(given, dict):
            raise ValueError(f"{key} cannot be {given!r}: {_FORMS}.")
        for name in given:
            if name not in _KEYS:
                raise ValueError(f"{key} cannot contain {name!r}. {suggestion(name, _KEYS)}")
        when = given.get("when", {})
        before = {setting.key: setting for setting in settings}
        for other, value in when.items():
            if other not in before:
                raise ValueError(f"{key} depends on {other}: write {other} above it.")
            if not before[other].holds(value):
                raise ValueError(f"{key} depends on {other} = {value!r}, which {other} cannot be.")
        settings.append(Setting(key, _distribution(key, given), when))
    return Space(content, tuple(settings))


def _distribution(key: str, given: Mapping[str, Any]) -> BaseDistribution:
    choices, low, high = (given.get(name) for name in ("choices", "low", "high"))
    plain = bool | int | float | str
    try:
        if choices is not None and len(given.keys() - {"when"}) == 1:
            if not (isinstance(choices, list) and choices and all(isinstance(one, plain) for one in choices)):
                raise ValueError("choices are a list of words, numbers, true or false")
            return CategoricalDistribution(choices)
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=given.get("log", False), step=given.get("step", 1))
        return FloatDistribution(float(low), float(high), log=given.get("log", False), step=given.get("step"))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key} cannot be {dict(given)}: {error}. Instead, {_FORMS}.") from error
