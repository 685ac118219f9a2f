"""The cells that a grid file describes.

Engines send cells to other processes, so this module imports torch only when a cell is resolved.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_bench.errors import suggestion
from cl_bench.run.configs import GROUPS, config_file, load, words

if TYPE_CHECKING:
    from cl_bench.run.configuration import Configuration

_KEYS = {
    "strategies": list,
    "datasets": list,
    "settings": dict,
    "orders": list,
    "seeds": list,
    "results": str,
    "common": dict,
    "tune": dict,
}


_AXES = {
    "order": "orders: [numpy:1993]",
    "seed": "seeds: [3]",
    "results": "results: FOLDER",
}
"""Options of a run that a grid has keys for, and what to write instead."""


@dataclass(frozen=True)
class Cell:
    """The words of the command that runs a cell.

    Attributes:
        strategy: Config stem or path.
        dataset: Config stem or path.
        overrides: Command-line words.
    """

    strategy: str
    dataset: str
    overrides: tuple[str, ...]

    def configuration(self) -> Configuration:
        """Return the cell's resolved configuration."""
        from cl_bench.run.configuration import layers, resolve

        return resolve(layers(self.strategy, self.dataset), self.overrides)

    def parts(self) -> tuple[tuple[str, ...], dict[str, str]]:
        """Return the words without seed and class order, and these two, if both are given."""
        factors = {}
        rest = []
        for word in self.overrides:
            key, equals, value = word.partition("=")
            if key in ("--seed", "--order") and equals:
                factors[key.removeprefix("--")] = value
            else:
                rest.append(word)
        return tuple(rest), factors

    @property
    def command(self) -> str:
        """The command that runs only this cell."""
        return shlex.join(("cl-bench", "run", self.strategy, self.dataset, *self.overrides))


@dataclass(frozen=True)
class Grid:
    """Strategies × datasets × settings × orders × seeds.

    Attributes:
        strategies: Config stems or paths.
        datasets: Config stems or paths.
        settings: Named sets of overrides for each strategy; a strategy without any runs once.
        orders: Class orders.
        seeds: Seeds.
        results: Folder of all results.
        common: Overrides of every cell.
        tune: How to tune the strategies first; empty if they run as they are.
    """

    strategies: list[str]
    datasets: list[str]
    settings: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    orders: list[str | list[int]] = field(default_factory=lambda: ["identity"])
    seeds: list[int] = field(default_factory=lambda: [1])
    results: str = "results"
    common: dict[str, Any] = field(default_factory=dict)
    tune: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse overrides that no cell would have.

        Raises:
            ValueError: If settings are of another strategy, or options are given twice or as an axis.
        """
        for strategy in self.settings:
            if strategy not in self.strategies:
                raise ValueError(f"There are settings for {strategy}, which is not among the strategies.")
        sets = {
            f"the setting {name} of {strategy}": overrides
            for strategy, settings in self.settings.items()
            for name, overrides in (settings or {}).items()
        }
        for where, overrides in {"common": self.common, **sets}.items():
            _require_one_spelling(overrides, where)
            for key in overrides.keys() & _AXES.keys():
                raise ValueError(
                    f"{key} cannot be in {where}, because each cell has its own: use {_AXES[key]}."
                )

    def cells(self) -> Iterator[Cell]:
        """Yield the cells, with seeds outermost: an unfinished grid has the first seed of every strategy."""
        for seed, order, dataset, strategy in itertools.product(
            self.seeds, self.orders, self.datasets, self.strategies
        ):
            for setting, overrides in (self.settings.get(strategy) or {"": {}}).items():
                named = {"setting": setting} if setting else {}
                values = (
                    self.common | overrides | named | {"order": order, "seed": seed, "results": self.results}
                )
                yield Cell(strategy, dataset, words(values))


def configurations(cells: Iterable[Cell]) -> Iterator[Configuration]:
    """Yield the resolved configuration of every cell; cells that differ in seed and order share most of it.

    Raises:
        ValueError: If a cell is not valid.
        FileNotFoundError: If a config does not exist.
    """
    of_pair = cache(lambda strategy, dataset: Cell(strategy, dataset, ()).configuration())
    of_setting = cache(lambda strategy, dataset, words: of_pair(strategy, dataset).overridden(words))
    for cell in cells:
        rest, factors = cell.parts()
        if len(factors) == 2:
            yield of_setting(cell.strategy, cell.dataset, rest).varied(**factors)
        else:
            yield of_pair(cell.strategy, cell.dataset).overridden(cell.overrides)


def read_grid(name: str, results: Path | None = None) -> Grid:
    """Return the grid with this config stem or path; ``results`` replaces its results folder.

    Raises:
        ValueError: If the file is not a grid.
        FileNotFoundError: If the file does not exist.
    """
    path = config_file("grids", name)
    content = load(path)
    if not {"strategies", "datasets"} <= content.keys():
        raise ValueError(f"{path} is not a grid: it must name strategies and datasets.")
    for key, value in content.items():
        if key not in _KEYS:
            raise ValueError(f"{path} cannot contain {key!r}. {suggestion(key, _KEYS)}")
        if not isinstance(value, _KEYS[key]):
            raise ValueError(f"In {path}, {key} must be a {_KEYS[key].__name__}, not {value!r}.")
    _require_names(content, path)
    for strategy, settings in content.get("settings", {}).items():
        if not isinstance(settings, dict) or not all(
            isinstance(overrides, dict) for overrides in settings.values()
        ):
            raise ValueError(
                f"In {path}, the settings of {strategy} must be names with their overrides, such as "
                "{small: {rank: 4}}."
            )
    if results is not None:
        content["results"] = str(results)
    try:
        return Grid(**content)
    except ValueError as error:
        raise ValueError(f"In {path}: {error}") from error


def _require_names(content: dict[str, Any], path: Path) -> None:
    for key in ("strategies", "datasets"):
        for name in content[key]:
            if not isinstance(name, str):
                raise ValueError(f"In {path}, {key} cannot hold {name!r}: write names of configs.")


def _require_one_spelling(overrides: dict[str, Any], where: str) -> None:
    """Require that no key stands both with and without its group."""
    plain: dict[str, str] = {}
    for key in overrides:
        group, _, rest = str(key).replace(".init_args.", ".").partition(".")
        name = rest if group in GROUPS and rest else f"{group}.{rest}".rstrip(".")
        if name in plain:
            raise ValueError(f"{plain[name]} and {key} are one key in {where}: keep one of them.")
        plain[name] = key
