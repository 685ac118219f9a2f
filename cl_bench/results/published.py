"""The numbers that papers print, with source, spread and doubts."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from cl_bench.errors import suggestion


@dataclass(frozen=True)
class Source:
    """A source of published numbers.

    Attributes:
        name: Its name in the rows of ``published.csv``.
        title: Paper, table or log.
        link: Its address; None if it has none.
        runs: Number of runs of a mean; None if not stated.
        spread: ``standard deviation``, ``standard error``, or None if not stated.
        backbone: Tag of the pretrained weights; None if not stated.
        own: Strategies whose own paper, code or baseline this is.
        remarks: Doubts about all of its numbers.
        imagenet_r_split: Its split of ImageNet-R; by default the list that most papers share.
    """

    name: str
    title: str
    link: str | None
    runs: int | None
    spread: str | None
    backbone: str | None
    own: tuple[str, ...]
    remarks: tuple[str, ...]
    imagenet_r_split: Literal["coda", "inflora", "sorted80"] = "coda"


@dataclass(frozen=True)
class Published:
    """One printed number, in percent.

    Attributes:
        source: Source that prints it.
        method: Name of the method there.
        strategy: Our config stem; empty if we have no such strategy.
        setting: Setting there, such as an ablation; empty for the method itself.
        dataset: Our config stem.
        num_experiences: Length of the stream.
        metric: Our name of the metric.
        mean: The number.
        std: Its spread, of the kind that the source states; NaN if none is printed.
        note: Doubts about this number.
    """

    source: Source
    method: str
    strategy: str
    setting: str
    dataset: str
    num_experiences: int
    metric: str
    mean: float
    std: float
    note: str


@cache
def sources() -> dict[str, Source]:
    """Return every source by name."""
    return {
        name: Source(name, **entry | {"own": tuple(entry["own"]), "remarks": tuple(entry["remarks"])})
        for name, entry in _yaml("sources.yaml").items()
    }


@cache
def published() -> tuple[Published, ...]:
    """Return every number, in the order of ``published.csv``."""
    text = (files("cl_bench.results") / "published.csv").read_text(encoding="utf-8")
    return tuple(
        Published(
            source=sources()[line["source"]],
            method=line["method"],
            strategy=line["strategy"],
            setting=line["setting"],
            dataset=line["dataset"],
            num_experiences=int(line["num_experiences"]),
            metric=line["metric"],
            mean=float(line["mean"]),
            std=float(line["std"]) if line["std"] else math.nan,
            note=line["note"],
        )
        for line in csv.DictReader(text.splitlines())
    )


def rows(strategy: str, dataset: str, num_experiences: int) -> list[Published]:
    """Return the numbers of one strategy on one benchmark; those of its own paper, code or baseline first.

    Raises:
        ValueError: If there are none; the message lists the benchmarks that have some.
    """
    require_known(strategy, dataset)
    found = [
        row
        for row in published()
        if (row.strategy, row.dataset, row.num_experiences) == (strategy, dataset, num_experiences)
        and not row.setting
    ]
    if not found:
        raise ValueError(
            f"No published number of {strategy} on {dataset} with {num_experiences} experiences is known "
            f"here. Known are: {_benchmarks(strategy)}."
        )
    return sorted(found, key=lambda row: strategy not in row.source.own)


def require_known(strategy: str, dataset: str) -> None:
    """Raise an error if no number of the strategy on the dataset is known here.

    Raises:
        ValueError: If there is none; the message suggests a similar name that has one.
    """
    strategies = sorted({row.strategy for row in _of_methods()})
    if strategy not in strategies:
        raise ValueError(
            f"No published number of {strategy!r} is known here. {suggestion(strategy, strategies)}"
        )
    datasets = sorted({row.dataset for row in _of_methods() if row.strategy == strategy})
    if dataset not in datasets:
        raise ValueError(
            f"No published number of {strategy} on {dataset!r} is known here. {suggestion(dataset, datasets)}"
        )


def by_source(rows: Iterable[Published]) -> dict[str, list[Published]]:
    """Return ``rows`` by the name of their source, in their order."""
    gathered: dict[str, list[Published]] = {}
    for row in rows:
        gathered.setdefault(row.source.name, []).append(row)
    return gathered


def reconstructed(strategy: str) -> Sequence[str]:
    """Return the reconstructed parts of ``strategy``; none if it follows paper or code."""
    return tuple(_yaml("standing.yaml").get(strategy, ()))


def sizes(dataset: str) -> tuple[int, int] | None:
    """Return the numbers of training and test images of ``dataset``; None if they are not known here."""
    found = _yaml("sizes.yaml").get(dataset)
    return None if found is None else (found[0], found[1])


def _benchmarks(strategy: str) -> str:
    mine = [row for row in _of_methods() if row.strategy == strategy]
    return ", ".join(dict.fromkeys(f"{row.dataset} with {row.num_experiences}" for row in mine))


def _of_methods() -> list[Published]:
    return [row for row in published() if row.strategy and not row.setting]


@cache
def _yaml(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((files("cl_bench.results") / name).read_text(encoding="utf-8"))
    return loaded
