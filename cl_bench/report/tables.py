"""Comparisons laid out as tables: which line, which column, which value is best, in no format yet."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cl_bench.report.comparison import (
    DISAGREEING,
    RANKING,
    Block,
    Comparison,
    Entry,
    contrasts,
    differences,
    flat,
    plain,
    shortened,
)
from cl_bench.report.statistics import NO_VALUES, Contrast, Statistic, against, corrected
from cl_bench.results.metrics import DEFINITIONS, HIGHER_IS_BETTER
from cl_bench.results.result import COSTS, PHASES, Result, digest

UNDEFINED = "–"
"""What a cell says of a metric that does not exist, or a cost that was not measured."""

UPPER_BOUND = "†"
"""Mark of a line that was trained on all classes at once."""

INCOMPLETE = "What lacks seeds or class orders that another line finished is not ranked."
"""What a table says where such a line has no mark."""

NOT_RUN = "not run"
"""What a cell says where a line has no result file at all."""

COST_HEADINGS = dict(
    zip(
        COSTS,
        (
            "seconds",
            *(phase.replace("_", " ") for phase in PHASES),
            "peak MB",
            "parameters",
            "stored MB",
        ),
        strict=True,
    )
)
"""What tables call a cost."""

SHORT_NAMES = {
    "acc/sample": "ACC",
    "acc/experience": "ACC (exp.)",
    "maa/sample": "MAA",
    "maa/experience": "MAA (exp.)",
    "bwt/gem": "BWT",
    "forgetting/chaudhry": "Forgetting",
}
"""What narrow columns call a metric; its definition stands below."""

PROVENANCE = ("python", "versions", "commit", "device", "threads", "images_sha256")
"""Parts of the provenance that are footnoted when mixed; times are always mixed."""

_MOST_PAIRS = 15  # pairs in a table to be read; of more entries, those against the best
_LISTED = 8  # values in a sentence
_OPTIONS = 80  # characters of a backbone's options


@dataclass
class Row:
    """One line of a table: the entries of one label, None on a benchmark where it was not run.

    Attributes:
        label: What the line is called.
        entries: One for each comparison of the table.
    """

    label: str
    entries: list[Entry | None]

    @property
    def is_joint(self) -> bool:
        """Whether the line is an upper bound."""
        return any(entry is not None and entry.is_joint for entry in self.entries)

    def was_run(self, index: int) -> bool:
        """Whether there is a finished run on benchmark ``index``."""
        entry = self.entries[index]
        return entry is not None and bool(entry.runs)

    def status(self, index: int) -> str:
        """Say why there is no finished run on benchmark ``index``; empty if there is one.

        What became of the runs that there are: ``failed``, ``diverged``, ``running``, ``disagreeing``.
        """
        entry = self.entries[index]
        if entry is None:
            return NOT_RUN
        if entry.runs:
            return ""
        return ", ".join(entry.statuses)

    def statistic(self, index: int, name: str) -> Statistic:
        """Return the statistic called ``name`` on benchmark ``index``."""
        entry = self.entries[index]
        return NO_VALUES if entry is None else entry.statistic(name)

    @property
    def rank(self) -> tuple[bool, list[float], str]:
        """Sort key: joint first, then by falling accuracy on the first benchmark, then the second."""
        means = [self.statistic(index, RANKING).mean for index in range(len(self.entries))]
        return not self.is_joint, [math.inf if math.isnan(mean) else -mean for mean in means], self.label


@dataclass
class Table:
    """Strategies by benchmarks and metrics.

    Attributes:
        comparisons: Benchmarks side by side, each under one protocol.
        metrics: Metrics shown, by name.
        rows: Joint first, then by falling accuracy.
        contrasts: For each comparison, by name of metric, every two lines on their shared blocks.
    """

    comparisons: list[Comparison]
    metrics: Sequence[str]
    rows: list[Row]
    contrasts: list[dict[str, list[Contrast]]] = field(default_factory=list)

    def places(self, index: int, name: str) -> list[int | None]:
        """Return for every row its place, 1 or 2, in metric ``name`` on benchmark ``index``; None beyond.

        Upper bounds have none, nor have lines that lack a block where another line lacks none: seeds and
        orders that one was spared make no record. What is equal as printed, to two decimals, is equal: a
        mark may not hang on a digit that nobody sees.
        """
        ranked_lines = self.ranked(index)
        means = [
            round(row.statistic(index, name).mean, 2) if ranks else math.nan
            for row, ranks in zip(self.rows, ranked_lines, strict=True)
        ]
        ranked = sorted({mean for mean in means if not math.isnan(mean)}, reverse=HIGHER_IS_BETTER[name])
        return [ranked.index(mean) + 1 if mean in ranked[:2] else None for mean in means]

    def leaves_out_incomplete(self) -> bool:
        """Whether on any benchmark a line is not ranked because it lacks blocks that another has."""
        return any(
            row.was_run(index) and not row.is_joint and not ranks
            for index in range(len(self.comparisons))
            for row, ranks in zip(self.rows, self.ranked(index), strict=True)
        )

    def ranked(self, index: int) -> list[bool]:
        """Return for every row whether it is ranked on benchmark ``index``.

        Upper bounds are not, nor is a row that lacks a block if another row has them all.
        """
        complete = [not row.is_joint and self._is_complete(row, index) for row in self.rows]
        return complete if any(complete) else [not row.is_joint for row in self.rows]

    def _is_complete(self, row: Row, index: int) -> bool:
        entry = row.entries[index]
        return entry is not None and len(entry.runs) == len(self.comparisons[index].blocks)

    def count(self, row: Row, index: int, name: str) -> str:
        """Return how many runs are behind a value, and of how many blocks where some are absent."""
        n = row.statistic(index, name).n
        if row.entries[index] is None or self._is_complete(row, index):
            return str(n)
        return f"{n} of {len(self.comparisons[index].blocks)}"

    def pairs(self, index: int) -> list[Contrast]:
        """Return the contrasts to be read on benchmark ``index``, in the first metric shown.

        All of them, or those against the best line where there are too many.
        """
        made = self.contrasts[index][self.metrics[0]]
        if len(made) <= _MOST_PAIRS:
            return made
        return against(made, made[0].first)


def tables(comparisons: Sequence[Comparison], metrics: Sequence[str]) -> list[Table]:
    """Lay out ``comparisons``: benchmarks of one protocol side by side, others in tables of their own.

    Of one protocol are benchmarks whose identities are equal beyond what follows dataset and length, so that
    other weights or another precision never stand in the columns beside.
    """
    together: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        if comparison.only_protocol:
            together.setdefault(digest(comparison.beyond_the_data), []).append(comparison)
    apart = [[comparison] for comparison in comparisons if not comparison.only_protocol]
    return [_table(shown, metrics) for shown in [*together.values(), *apart]]


def _table(comparisons: list[Comparison], metrics: Sequence[str]) -> Table:
    by_label = [{entry.label: entry for entry in comparison.entries} for comparison in comparisons]
    labels = dict.fromkeys(label for entries in by_label for label in entries)
    rows = [Row(label, [entries.get(label) for entries in by_label]) for label in labels]
    made = [{name: contrasts(comparison, name) for name in metrics} for comparison in comparisons]
    return Table(comparisons, metrics, sorted(rows, key=lambda row: row.rank), corrected(made))


@dataclass(frozen=True)
class Absence:
    """A run that enters no mean.

    Attributes:
        label: Its entry.
        seed: Its seed.
        order: Its class order.
        status: ``running``, ``failed``, ``diverged``, ``disagreeing``; ``missing`` if only other entries have
            this block.
        error: What happened, or how far it is; empty if there is nothing to say.
    """

    label: str
    seed: int
    order: str
    status: str
    error: str


def compared(comparison: Comparison) -> str:
    """Say in words what the entries of ``comparison`` have in common."""
    run = comparison.results[0]
    seeds = [str(seed) for seed in sorted({seed for seed, _ in comparison.blocks})]
    orders = sorted({order for _, order in comparison.blocks})
    identity = comparison.identity
    return (
        f"{run.dataset}{_variants(identity)}: {len(run.class_names)} classes in "
        f"{counted(run.num_experiences, 'experience')}, {sum(run.test_images):,} "
        f"{identity.get('evaluated_on', 'test')} images; backbone {backbone(identity)}; "
        f"{_listed('seed', seeds)}; {_listed('class order', orders)}; protocol {comparison.fingerprint}."
    )


def _variants(identity: Mapping[str, Any]) -> str:
    """Say which of its published meanings the dataset has, in brackets; nothing where it has one."""
    chosen = [f"{name.replace('_', ' ')} {value}" for name, value in identity.get("variants", {}).items()]
    return f" ({', '.join(chosen)})" if chosen else ""


def counted(number: int, noun: str) -> str:
    """Return ``number`` and ``noun``, in the plural where it needs one.

    >>> counted(1, "run"), counted(2, "run")
    ('1 run', '2 runs')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def backbone(identity: Mapping[str, Any]) -> str:
    """Say which backbone with which weights a protocol's identity names.

    >>> backbone({"backbone": {"model": "vision_transformer", "options": {"depth": 2}, "weights": "random"}})
    'vision_transformer (depth=2), seeded random weights: no pre-training'
    """
    described = identity.get("backbone", {})
    if "model" not in described:
        return "not recorded"
    options = ", ".join(f"{key}={value}" for key, value in (described.get("options") or {}).items())
    model = f"{described['model']} ({shortened([options], _OPTIONS)[0]})" if options else described["model"]
    return f"{model}, {_weights(described)}"


def protocol_differences(compared: Sequence[Comparison]) -> list[str]:
    """Say in which fields and values protocols differ that share no table.

    One sentence for every benchmark that was run under several, and one for benchmarks that differ in more
    than follows their data.
    """
    benchmarks: dict[str, list[Comparison]] = {}
    for comparison in compared:
        benchmarks.setdefault(comparison.benchmark, []).append(comparison)
    sentences = [
        f"{benchmark} was run under {len(found)} protocols, which share no table because they differ in "
        f"{_differing([(one.fingerprint, one.identity) for one in found])}."
        for benchmark, found in benchmarks.items()
        if len(found) > 1
    ]
    side_by_side = [(one.title, one.beyond_the_data) for one in compared if one.only_protocol]
    differing = _differing(side_by_side)
    if differing:
        names = ", ".join(title for title, _ in side_by_side)
        sentences.append(f"Not all of {names} share a table, because they differ in {differing}.")
    return sentences


def absences(comparison: Comparison) -> list[Absence]:
    """List the runs of ``comparison`` that enter no mean."""
    listed: list[Absence] = []
    blocks = comparison.blocks
    for entry in comparison.entries:
        listed += [
            Absence(entry.label, run.seed, run.order, run.status, _happened(run)) for run in entry.unfinished
        ]
        listed += [
            Absence(
                entry.label,
                seed,
                order,
                DISAGREEING,
                "finished result files of this cell have unequal counts",
            )
            for seed, order in entry.disagreeing
        ]
        listed += [
            Absence(entry.label, seed, order, "missing", "") for seed, order in sorted(blocks - entry.blocks)
        ]
    return listed


def absent(comparison: Comparison) -> list[str]:
    """Say what enters no mean, a line for each run that did not finish and for each gap that rows share."""
    lines: list[str] = []
    gaps: dict[Block, list[str]] = {}
    for absence in absences(comparison):
        if absence.status == "missing":
            gaps.setdefault((absence.seed, absence.order), []).append(absence.label)
            continue
        cause = f": {absence.error}" if absence.error else ""
        lines.append(
            f"{absence.label}, seed {absence.seed}, class order {absence.order}: {absence.status}{cause}"
        )
    lines += [
        f"seed {seed}, class order {order}: no result of {'; '.join(_abridged(labels))}"
        for (seed, order), labels in sorted(gaps.items())
    ]
    if comparison.copies:
        lines.append(f"{counted(comparison.copies, 'result file')} repeating a cell already counted")
    return lines


def unnamed_differences(comparison: Comparison) -> list[str]:
    """Say in which settings rows of one name differ beyond what their labels show."""
    return [
        f"{name}: {', '.join(_abridged(settings))}" for name, settings in comparison.unnamed_settings.items()
    ]


def mixed_provenance(comparison: Comparison) -> list[str]:
    """Say which parts of the provenance of finished runs are mixed, each value with its number of runs.

    Of an entry whose runs were on several devices, say which of them its seconds and memory are of.
    """
    found: dict[str, Counter[str]] = {}
    for run in (run for entry in comparison.finished for run in entry.runs):
        known = flat({key: value for key, value in run.provenance.items() if key in PROVENANCE})
        for key, value in known.items():
            found.setdefault(key, Counter())[str(value)] += 1
    mixed = [
        f"{key} {', '.join(_abridged([f'{value} ({n})' for value, n in values.most_common()]))}"
        for key, values in sorted(found.items())
        if len(values) > 1
    ]
    return mixed + [
        f"{entry.label}: seconds and memory are those of {counted(len(entry.on_one_device), 'run')} on "
        f"{entry.devices[0]} alone"
        for entry in comparison.finished
        if len(entry.devices) > 1
    ]


def definitions(names: Iterable[str]) -> list[str]:
    """Return the definition of each metric, after its name."""
    return [f"{name}: {DEFINITIONS[name]}" for name in names]


def _differing(named: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Name every field in which protocols differ, with each value and whose it is; empty if in none."""
    fields = []
    for key, values in differences([identity for _, identity in named]).items():
        held: dict[str, list[str]] = {}
        for (name, _), value in zip(named, values, strict=True):
            held.setdefault("not recorded" if value is None else plain(value), []).append(name)
        words = [
            f"{value} in {', '.join(names)}"
            for value, names in zip(shortened(list(held)), held.values(), strict=True)
        ]
        fields.append(f"{key} ({'; '.join(words)})")
    return ", ".join(fields)


def _weights(described: Mapping[str, Any]) -> str:
    if described["weights"] == "random":
        return "seeded random weights: no pre-training"
    source = "weights from a file" if described["weights"] == "file" else f"{described['weights']} weights"
    return f"{source}, sha256 {described['weights_sha256'][:8]}" if "weights_sha256" in described else source


def _happened(run: Result) -> str:
    if run.status != "running":
        return run.error or ""
    done = sum(row is not None for row in run.rows)
    return f"{done} of {counted(run.num_experiences, 'experience')} evaluated"


def _listed(noun: str, values: Sequence[str]) -> str:
    return f"{noun if len(values) == 1 else f'{noun}s'} {', '.join(_abridged(values))}"


def _abridged(values: Sequence[str]) -> list[str]:
    if len(values) <= _LISTED:
        return list(values)
    return [*values[:_LISTED], f"and {len(values) - _LISTED} more"]
