"""Runs of one benchmark under one protocol, gathered into entries that may be compared."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from cl_bench.artifacts.confusion import Confusion
from cl_bench.errors import visible
from cl_bench.report.statistics import Contrast, Statistic, statistic, tested
from cl_bench.results.metrics import BOUNDS
from cl_bench.results.result import COSTS, Regime, Result, Row

RANKING = "acc/sample"
"""Metric by which entries are ordered."""

OF_THE_DATA = (
    "dataset",
    "variants",
    "train_images",
    "test_images",
    "class_names",
    "decoding",
    "image_size",
    "train_transform",
    "test_transform",
    "experience_sizes",
    "backbone.options.img_size",
    "backbone.normalisation",
)
"""Parts of an identity that dataset and length decide: benchmarks of one table may differ in them."""

Block = tuple[int, str]
"""Seed and class order of a run."""

DISAGREEING = "disagreeing"
"""Status of a cell whose finished result files have unequal counts."""

WIDTH = 40
"""Maximal number of characters of a value in a sentence."""

_CONTEXT = 8

_DIGITS = 9  # decimals of a difference in percent: digits beyond them are rounding errors
_OF_A_COST = (0.0, math.inf)  # the bounds of seconds, bytes and parameters
_OF_A_DEVICE = tuple(name for name in COSTS if name.startswith("seconds") or name == "peak_megabytes")


@dataclass
class Entry:
    """One row on one benchmark: runs that differ only in seed and class order.

    Attributes:
        label: Its name in tables and pictures, unique in the comparison.
        strategy: Name of the strategy.
        group: Hash of the cell without seed and class order.
        regime: ``sequential`` or ``joint``.
        runs: Finished runs, one for each block; means are over them.
        unfinished: Runs that are running, failed or diverged, in blocks without a finished run.
        disagreeing: Blocks whose finished result files have unequal counts; means exclude them.
        measured: Every metric and cost of the finished runs, by block.
        confusions: Those of the runs that have kept predictions.
    """

    label: str
    strategy: str
    group: str
    regime: Regime
    runs: list[Result]
    unfinished: list[Result]
    disagreeing: list[Block]
    measured: dict[Block, dict[str, float]]
    confusions: list[Confusion] = field(default_factory=list)

    @property
    def is_joint(self) -> bool:
        """Whether this is an upper bound, trained on all classes at once."""
        return self.regime == "joint"

    @cached_property
    def devices(self) -> list[str]:
        """Kinds of device of the runs, that of most runs first, then by name."""
        counts = Counter(_device(run) for run in self.runs)
        return sorted(counts, key=lambda device: (-counts[device], device))

    @cached_property
    def on_one_device(self) -> list[Result]:
        """Runs on the device of most runs: seconds and memory are averaged over these only."""
        return [run for run in self.runs if _device(run) == self.devices[0]]

    @property
    def statuses(self) -> list[str]:
        """Status of the cells that means exclude."""
        return sorted(
            {run.status for run in self.unfinished} | ({DISAGREEING} if self.disagreeing else set())
        )

    def statistic(self, name: str) -> Statistic:
        """Return the statistic of the metric or cost ``name``; it has no values if no run has any."""
        if name not in self._statistics:
            runs = self.on_one_device if name in _OF_A_DEVICE else self.runs
            values = (self.measured[_block(run)].get(name, math.nan) for run in runs)
            self._statistics[name] = (
                statistic(values, BOUNDS[name], self.resolution)
                if name in BOUNDS
                else statistic(values, _OF_A_COST)
            )
        return self._statistics[name]

    @cached_property
    def training_data(self) -> str:
        """What the runs keep of old training data, in a word; empty if none has recorded it."""
        return ", ".join(sorted({run.training_data for run in self.runs if run.training_data}))

    @cached_property
    def resolution(self) -> float:
        """What one image changes in a percentage over all images evaluated, in points."""
        return max((100 / sum(run.test_images) for run in self.runs), default=0.0)

    @cached_property
    def _statistics(self) -> dict[str, Statistic]:
        return {}

    @property
    def blocks(self) -> set[Block]:
        """Seeds and class orders that have a result file, finished or not."""
        return {*(_block(run) for run in (*self.runs, *self.unfinished)), *self.disagreeing}

    @property
    def rank(self) -> tuple[bool, float, str]:
        """Sort key: joint first, then the higher mean of ``RANKING``, entries without one last."""
        mean = self.statistic(RANKING).mean
        return not self.is_joint, math.inf if math.isnan(mean) else -mean, self.label


@dataclass
class Comparison:
    """All entries of one benchmark under one protocol.

    Attributes:
        benchmark: Dataset and number of experiences.
        fingerprint: Hash of the protocol's identity.
        only_protocol: Whether the benchmark was run under this protocol only.
        results: The runs of the entries, one for each cell.
        entries: Joint first, then by falling accuracy.
        unnamed_settings: By name of a strategy, settings that differ between its entries and are in no label.
        copies: Number of further result files that repeat one of these cells.
    """

    benchmark: str
    fingerprint: str
    only_protocol: bool
    results: list[Result]
    entries: list[Entry]
    unnamed_settings: dict[str, list[str]]
    copies: int

    @property
    def title(self) -> str:
        """The benchmark, followed by the fingerprint if it was run under several protocols."""
        return self.benchmark if self.only_protocol else f"{self.benchmark}-{self.fingerprint}"

    @property
    def identity(self) -> Mapping[str, Any]:
        """The identity that all runs of this comparison share."""
        return self.results[0].protocol.identity

    @property
    def beyond_the_data(self) -> dict[str, Any]:
        """The identity by dotted keys, without what dataset and length decide: equal within a table."""
        return {
            key: value
            for key, value in flat(self.identity).items()
            if not any(key == part or key.startswith(f"{part}.") for part in OF_THE_DATA)
        }

    @property
    def finished(self) -> list[Entry]:
        """Entries with at least one finished run."""
        return [entry for entry in self.entries if entry.runs]

    @cached_property
    def blocks(self) -> set[Block]:
        """Seeds and class orders of any run."""
        return {_block(run) for run in self.results}


def comparisons(results: Iterable[Result]) -> list[Comparison]:
    """Return one comparison for each benchmark and protocol in ``results``.

    They are sorted by name of the dataset, then from short to long streams.
    """
    gathered: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for result in results:
        key = (result.benchmark, result.protocol.fingerprint)
        gathered.setdefault(key, {}).setdefault(result.group, []).append(result)
    protocols = Counter(benchmark for benchmark, _ in gathered)
    return [
        _comparison(benchmark, fingerprint, groups, protocols[benchmark] == 1)
        for (benchmark, fingerprint), groups in sorted(gathered.items(), key=_by_length)
    ]


def contrasts(comparison: Comparison, metric: str) -> list[Contrast]:
    """Return the contrasts of every two finished entries of ``comparison`` in ``metric``, on shared blocks.

    Upper bounds are excluded. The higher-ranked entry of a pair comes first, and pairs are in the order of
    the ranking. The p values are not corrected: :func:`corrected` does that over a whole table, because a
    reader sees its tests together.
    """
    entries = [entry for entry in comparison.finished if not entry.is_joint]
    made = [contrast(first, second, metric) for first, second in itertools.combinations(entries, 2)]
    p = tested([made_one.difference for made_one in made])
    return [replace(made_one, p=p_one) for made_one, p_one in zip(made, p, strict=True)]


def contrast(first: Entry, second: Entry, metric: str) -> Contrast:
    """Return the difference of two entries on their shared blocks, without a test."""
    ours, theirs = _by_block(first, metric), _by_block(second, metric)
    shared = sorted(ours.keys() & theirs.keys())
    values = (round(ours[block] - theirs[block], _DIGITS) for block in shared)
    least, greatest = BOUNDS[metric]
    bounds = (least - greatest, greatest - least)
    difference = statistic(values, bounds, first.resolution + second.resolution)
    return Contrast(first.label, second.label, metric, difference)


def _by_length(gathered: tuple[tuple[str, str], Mapping[str, Sequence[Result]]]) -> tuple[str, int, str]:
    (_, fingerprint), groups = gathered
    run = next(iter(groups.values()))[0]
    return run.dataset, run.num_experiences, fingerprint


def _comparison(
    benchmark: str, fingerprint: str, groups: Mapping[str, Sequence[Result]], only_protocol: bool
) -> Comparison:
    cells = {group: _one_per_block(found) for group, found in groups.items()}
    disagreeing = {group: _disagreeing(found) for group, found in groups.items()}
    labels, unnamed = _labelled({group: runs[0] for group, runs in cells.items()})
    entries = [_entry(group, labels[group], runs, disagreeing[group]) for group, runs in cells.items()]
    results = [run for runs in cells.values() for run in runs]
    agreeing = [
        run for group, found in groups.items() for run in found if _block(run) not in disagreeing[group]
    ]
    counted = sum(_block(run) not in disagreeing[group] for group, runs in cells.items() for run in runs)
    return Comparison(
        benchmark=benchmark,
        fingerprint=fingerprint,
        only_protocol=only_protocol,
        results=results,
        entries=sorted(entries, key=lambda entry: entry.rank),
        unnamed_settings=unnamed,
        copies=len(agreeing) - counted,
    )


def _one_per_block(found: Sequence[Result]) -> list[Result]:
    """Return one run for each block, a finished one if possible: a copied file is not a second sample."""
    cells: dict[Block, Result] = {}
    for result in found:
        kept = cells.setdefault(_block(result), result)
        if kept.status != "done" and result.status == "done":
            cells[_block(result)] = result
    return list(cells.values())


def _disagreeing(found: Sequence[Result]) -> list[Block]:
    """Return the blocks in which two finished runs have unequal counts, and so are not copies."""
    rows: dict[Block, list[Row | None]] = {}
    finished = [run for run in found if run.status == "done"]
    unequal = (_block(run) for run in finished if rows.setdefault(_block(run), run.rows) != run.rows)
    return sorted(set(unequal))


def _entry(group: str, label: str, runs: Sequence[Result], disagreeing: list[Block]) -> Entry:
    agreeing = [run for run in runs if _block(run) not in disagreeing]
    finished = [run for run in agreeing if run.status == "done"]
    return Entry(
        label=label,
        strategy=runs[0].strategy,
        group=group,
        regime=runs[0].regime,
        runs=finished,
        unfinished=[run for run in agreeing if run.status != "done"],
        disagreeing=disagreeing,
        measured={_block(run): run.metrics() | run.spending() for run in finished},
    )


def _device(run: Result) -> str:
    return str(run.provenance.get("device"))


def _block(run: Result) -> Block:
    return run.seed, run.order


def _by_block(entry: Entry, metric: str) -> Mapping[Block, float]:
    return {
        block: values[metric] for block, values in entry.measured.items() if not math.isnan(values[metric])
    }


def _labelled(representatives: Mapping[str, Result]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return the label of every group, and by strategy the settings that differ but are in no label."""
    families: dict[str, list[str]] = {}
    for group, run in representatives.items():
        families.setdefault(run.strategy, []).append(group)
    labels: dict[str, str] = {}
    unnamed: dict[str, list[str]] = {}
    for name, groups in families.items():
        suffixes, silent = _suffixes([representatives[group] for group in groups])
        labels |= {group: visible(name + suffix) for group, suffix in zip(groups, suffixes, strict=True)}
        unnamed |= {name: silent} if silent else {}
    shared = Counter(labels.values())
    for group in labels:
        while shared[labels[group]] > 1:
            labels[group] += f", group={group}"
            shared[labels[group]] += 1
    return labels, unnamed


def _suffixes(runs: Sequence[Result]) -> tuple[list[str], list[str]]:
    """Return label endings that distinguish runs of one name, and the differing settings not in any of them.

    The endings are the names of the settings if these are unique, otherwise the values of a few settings.
    """
    table = differences([_blockless(run.config) for run in runs])
    names = [run.setting for run in runs]
    if len(set(names)) == len(runs) > 1:
        return ["" if name is None else f", {name}" for name in names], short_names(list(table))
    keys = distinguishing(table)
    suffixes = [""] * len(runs)
    for key, name in zip(keys, short_names(keys), strict=True):
        suffixes = [
            suffix if value is None else f"{suffix}, {name}={value}"
            for suffix, value in zip(suffixes, _readable(table[key]), strict=True)
        ]
    return suffixes, short_names([key for key in table if key not in keys])


def _readable(values: Sequence[str | None]) -> list[str | None]:
    present = list(dict.fromkeys(value for value in values if value is not None))
    words = dict(zip(present, shortened([plain(value) for value in present]), strict=True))
    return [None if value is None else words[value] for value in values]


def _blockless(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("seed", "order")}


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``nested`` with dotted keys; an empty mapping is a value.

    >>> flat({"backbone": {"model": "vit", "options": {}}, "epochs": 5})
    {'backbone.model': 'vit', 'backbone.options': {}, 'epochs': 5}
    """
    values: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


def differences(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[str | None]]:
    """Return the keys in which ``settings`` differ, with the JSON value in each; None if a key is missing.

    >>> differences([{"rank": 4, "epochs": 5}, {"rank": 8, "epochs": 5}])
    {'rank': ['4', '8']}
    """
    flattened = [flat(setting) for setting in settings]
    keys = dict.fromkeys(key for setting in flattened for key in setting)
    table = {
        key: [json.dumps(each[key], sort_keys=True) if key in each else None for each in flattened]
        for key in keys
    }
    return {key: values for key, values in table.items() if len(set(values)) > 1}


def distinguishing(table: Mapping[str, Sequence[str | None]]) -> list[str]:
    """Return a few keys of ``table`` whose values together distinguish all of its columns.

    The search is greedy: the key that separates most columns first, among equals the shortest name.

    >>> distinguishing({"optimizer.lr": ["1", "2", "1"], "rank": ["4", "4", "8"], "alpha": ["4", "4", "8"]})
    ['optimizer.lr', 'rank']
    """
    keys: list[str] = []
    candidates = sorted(table, key=lambda key: (len(key.rpartition(".")[2]), key))
    columns: list[tuple[str | None, ...]] = [()] * max((len(values) for values in table.values()), default=0)
    while candidates:
        extended = {
            key: [(*column, value) for column, value in zip(columns, table[key], strict=True)]
            for key in candidates
        }
        best = max(candidates, key=lambda key: len(set(extended[key])))
        if len(set(extended[best])) == len(set(columns)):
            break
        columns = extended[best]
        keys.append(best)
        candidates.remove(best)
    return keys


def short_names(keys: Sequence[str]) -> list[str]:
    """Return for every dotted key its shortest ending that no other key has.

    >>> short_names(["strategy.rank", "head.lr", "adapter.lr"])
    ['rank', 'head.lr', 'adapter.lr']
    """
    parts = [key.split(".") for key in keys]
    endings = [[".".join(own[start:]) for start in reversed(range(len(own)))] for own in parts]
    taken = Counter(ending for own in endings for ending in own)
    return [next((ending for ending in own if taken[ending] == 1), own[-1]) for own in endings]


def shortened(texts: Sequence[str], width: int = WIDTH) -> list[str]:
    """Return ``texts`` cut to about ``width`` characters, keeping the part in which they differ.

    >>> shortened(["Resize(32), CenterCrop(32)", "Resize(32), CenterCrop(28)"], width=16)
    ['…terCrop(32)', '…terCrop(28)']
    """
    start = 0
    if len(texts) > 1 and max(map(len, texts)) > width:
        start = max(0, _first_difference(texts) - _CONTEXT)
    cut = [f"…{text[start:]}" if start else text for text in texts]
    return [text if len(text) <= width else f"{text[: width - 1]}…" for text in cut]


def plain(value: str) -> str:
    r"""Return a JSON value for a reader: a text on one line without quotation marks.

    >>> plain(json.dumps("Compose(\n  Resize\n)")), plain("0.5")
    ('Compose( Resize )', '0.5')
    """
    decoded = json.loads(value)
    return " ".join(decoded.split()) if isinstance(decoded, str) else value


def _first_difference(texts: Sequence[str]) -> int:
    alike = (len(set(characters)) == 1 for characters in zip(*texts, strict=False))
    return next((place for place, same in enumerate(alike) if not same), min(map(len, texts)))
