"""Comparisons laid out as tables, in no format yet: rows, columns, ranks, and the sentences around them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cl_bench.errors import visible
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
from cl_bench.report.statistics import NO_VALUES, PERMUTATION_BLOCKS, Contrast, Statistic, against, corrected
from cl_bench.results.metrics import DEFINITIONS, HIGHER_IS_BETTER
from cl_bench.results.result import COSTS, PHASES, Result, digest

UNDEFINED = "–"
"""Text of a cell whose metric is undefined, or whose cost was not measured."""

UPPER_BOUND = "†"
"""Mark of a row that was trained on all classes at once."""

INCOMPLETE = "Rows that lack seeds or class orders which another row finished are not ranked."
"""Sentence for a table with such rows."""

HOW_TO_READ_DIFFERENCES = (
    "Differences are taken on the seeds and class orders that both finished, from three on with a 95 % logit "
    "interval, no narrower than one image of either row: Student's interval on a scale without ends, so its "
    "own ends are possible. If it contains zero, the difference is possibly noise. p: sign-flip permutation "
    "test after Holm's correction over every pair, metric and benchmark of the table, from "
    f"{PERMUTATION_BLOCKS} shared blocks up: with fewer, no difference can reach 0.05. Blocks are taken as "
    "independent: with one class order, intervals describe the variation over seeds only; with several seeds "
    "for each order, they may be too narrow."
)
"""Sentences for every table of differences."""

NOT_RUN = "not run"
"""Text of a cell whose row has no result file."""

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
"""Headings of costs."""

TRAINING_DATA = "training data kept"
"""Heading of what a strategy keeps of old training data, in tables where some run has recorded it."""

SHORT_NAMES = {
    "acc/sample": "ACC",
    "acc/experience": "ACC (exp.)",
    "maa/sample": "MAA",
    "maa/experience": "MAA (exp.)",
    "bwt/gem": "BWT",
    "forgetting/chaudhry": "Forgetting",
}
"""Headings of metrics in narrow columns; tables also give the definitions."""

PROVENANCE = ("python", "versions", "commit", "device", "threads", "images_sha256")
"""Parts of the provenance that a table reports if they are mixed; times always are."""

_MOST_PAIRS = 15  # pairs in a table for reading; if there are more, only those with the best entry
_LISTED = 8  # values in a sentence
_OPTIONS = 80  # characters of a backbone's options
_ERROR = 500  # characters of an error


@dataclass
class Row:
    """One row of a table: the entries of one label.

    Attributes:
        label: Name of the row.
        entries: An entry for each comparison of the table; None if the label was not run there.
    """

    label: str
    entries: list[Entry | None]

    @property
    def is_joint(self) -> bool:
        """Whether the row is an upper bound."""
        return any(entry is not None and entry.is_joint for entry in self.entries)

    def was_run(self, index: int) -> bool:
        """Return whether there is a finished run on benchmark ``index``."""
        entry = self.entries[index]
        return entry is not None and bool(entry.runs)

    def status(self, index: int) -> str:
        """Return the statuses of the runs on benchmark ``index`` if none has finished, otherwise nothing.

        They are ``failed``, ``diverged``, ``running`` and ``disagreeing``, or ``NOT_RUN``.
        """
        entry = self.entries[index]
        if entry is None:
            return NOT_RUN
        if entry.runs:
            return ""
        return ", ".join(entry.statuses)

    def statistic(self, index: int, name: str) -> Statistic:
        """Return the statistic of the metric or cost ``name`` on benchmark ``index``."""
        entry = self.entries[index]
        return NO_VALUES if entry is None else entry.statistic(name)

    def training_data(self, index: int) -> str:
        """Return what its runs on benchmark ``index`` keep of old training data, or ``UNDEFINED``."""
        entry = self.entries[index]
        return (entry.training_data if entry is not None else "") or UNDEFINED

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
        contrasts: For each comparison, by name of the metric, the contrasts of every two rows.
    """

    comparisons: list[Comparison]
    metrics: Sequence[str]
    rows: list[Row]
    contrasts: list[dict[str, list[Contrast]]] = field(default_factory=list)

    def places(self, index: int, name: str) -> list[int | None]:
        """Return for every row its place, 1 or 2, in metric ``name`` on benchmark ``index``; None for others.

        Rows that are not ranked have no place. Means that are equal to two decimals, as they are printed,
        share a place.
        """
        ranked_lines = self.ranked(index)
        means = [
            round(row.statistic(index, name).mean, 2) if ranks else math.nan
            for row, ranks in zip(self.rows, ranked_lines, strict=True)
        ]
        ranked = sorted({mean for mean in means if not math.isnan(mean)}, reverse=HIGHER_IS_BETTER[name])
        return [ranked.index(mean) + 1 if mean in ranked[:2] else None for mean in means]

    @property
    def keeps_training_data(self) -> bool:
        """Whether some run has recorded what it keeps of old training data."""
        return any(entry.training_data for comparison in self.comparisons for entry in comparison.entries)

    def leaves_out_incomplete(self) -> bool:
        """Return whether some row with finished runs is not ranked because it lacks blocks of another row."""
        return any(
            row.was_run(index) and not row.is_joint and not ranks
            for index in range(len(self.comparisons))
            for row, ranks in zip(self.rows, self.ranked(index), strict=True)
        )

    def ranked(self, index: int) -> list[bool]:
        """Return for every row whether it is ranked on benchmark ``index``.

        Upper bounds are not ranked. If a row has every block, rows that lack one are not ranked either: the
        seeds and orders they were spared would count for them.
        """
        complete = [not row.is_joint and self._is_complete(row, index) for row in self.rows]
        return complete if any(complete) else [not row.is_joint for row in self.rows]

    def _is_complete(self, row: Row, index: int) -> bool:
        entry = row.entries[index]
        return entry is not None and len(entry.runs) == len(self.comparisons[index].blocks)

    def count(self, row: Row, index: int, name: str) -> str:
        """Return the number of runs of a value, and of how many blocks if some are missing."""
        n = row.statistic(index, name).n
        if row.entries[index] is None or self._is_complete(row, index):
            return str(n)
        return f"{n} of {len(self.comparisons[index].blocks)}"

    def pairs(self, index: int) -> list[Contrast]:
        """Return the contrasts on benchmark ``index`` that a table shows, in its first metric.

        They are all contrasts, or those with the best row if there are too many.
        """
        made = self.contrasts[index][self.metrics[0]]
        if len(made) <= _MOST_PAIRS:
            return made
        return against(made, made[0].first)


def tables(comparisons: Sequence[Comparison], metrics: Sequence[str]) -> list[Table]:
    """Return ``comparisons`` as tables, with benchmarks of one protocol in the columns of one table.

    Benchmarks have one protocol if their identities differ only in what dataset and length decide. Different
    weights or precisions therefore never share a table.
    """
    together: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        if comparison.only_protocol:
            together.setdefault(digest(comparison.beyond_the_data), []).append(comparison)
    separate = [[comparison] for comparison in comparisons if not comparison.only_protocol]
    return [_table(shown, metrics) for shown in [*together.values(), *separate]]


def _table(comparisons: list[Comparison], metrics: Sequence[str]) -> Table:
    by_label = [{entry.label: entry for entry in comparison.entries} for comparison in comparisons]
    labels = dict.fromkeys(label for entries in by_label for label in entries)
    rows = [Row(label, [entries.get(label) for entries in by_label]) for label in labels]
    made = [{name: contrasts(comparison, name) for name in metrics} for comparison in comparisons]
    return Table(comparisons, metrics, sorted(rows, key=lambda row: row.rank), corrected(made))


@dataclass(frozen=True)
class Absence:
    """A run that is in no mean.

    Attributes:
        label: Its entry.
        seed: Its seed.
        order: Its class order.
        status: ``running``, ``failed``, ``diverged`` or ``disagreeing``; ``missing`` if only other entries
            have this block.
        error: The error or the progress, in one sentence; may be empty.
    """

    label: str
    seed: int
    order: str
    status: str
    error: str


def compared(comparison: Comparison) -> str:
    """Return a sentence about what the entries of ``comparison`` have in common."""
    run = comparison.results[0]
    seeds = [str(seed) for seed in sorted({seed for seed, _ in comparison.blocks})]
    orders = sorted({order for _, order in comparison.blocks})
    identity = comparison.identity
    return visible(
        f"{run.dataset}{_variants(identity)}: {len(run.class_names)} classes in "
        f"{counted(run.num_experiences, 'experience')}, {sum(run.test_images):,} "
        f"{identity.get('evaluated_on', 'test')} images; backbone {backbone(identity)}; "
        f"{_listed('seed', seeds)}; {_listed('class order', orders)}; protocol {comparison.fingerprint}."
    )


def _variants(identity: Mapping[str, Any]) -> str:
    """Return in brackets which published variant of the dataset was used; empty if there is only one."""
    chosen = [f"{name.replace('_', ' ')} {value}" for name, value in identity.get("variants", {}).items()]
    return f" ({', '.join(_abridged(chosen))})" if chosen else ""


def counted(number: int, noun: str) -> str:
    """Return ``number`` and ``noun``, in the plural unless the number is 1.

    >>> counted(1, "run"), counted(2, "run")
    ('1 run', '2 runs')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def backbone(identity: Mapping[str, Any]) -> str:
    """Return the backbone and the weights that a protocol's identity names.

    >>> backbone({"backbone": {"model": "vision_transformer", "options": {"depth": 2}, "weights": "random"}})
    'vision_transformer (depth=2), seeded random weights: no pre-training'
    """
    described = identity.get("backbone", {})
    if "model" not in described:
        return "not recorded"
    options = ", ".join(f"{key}={value}" for key, value in (described.get("options") or {}).items())
    model = f"{described['model']} ({shortened([options], _OPTIONS)[0]})" if options else described["model"]
    return visible(f"{model}, {_weights(described)}")


def protocol_differences(compared: Sequence[Comparison]) -> list[str]:
    """Return sentences about the fields and values in which protocols differ, so that they share no table.

    There is one for every benchmark that was run under several protocols, and one for benchmarks that differ
    in more than their data decide.
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
    return [visible(sentence) for sentence in sentences]


def absences(comparison: Comparison) -> list[Absence]:
    """Return the runs of ``comparison`` that are in no mean."""
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
    """Return a line for each run that did not finish, and for each block that rows lack."""
    lines: list[str] = []
    gaps: dict[Block, list[str]] = {}
    for absence in absences(comparison):
        if absence.status == "missing":
            gaps.setdefault((absence.seed, absence.order), []).append(absence.label)
            continue
        cause = f": {shortened([absence.error], _ERROR)[0]}" if absence.error else ""
        lines.append(
            f"{absence.label}, seed {absence.seed}, class order {absence.order}: {absence.status}{cause}"
        )
    lines += [
        f"seed {seed}, class order {order}: no result of {'; '.join(_abridged(labels))}"
        for (seed, order), labels in sorted(gaps.items())
    ]
    if comparison.copies:
        lines.append(f"{counted(comparison.copies, 'result file')} repeating a cell already counted")
    return [visible(line) for line in lines]


def unnamed_differences(comparison: Comparison) -> list[str]:
    """Return a line for each strategy whose rows differ in settings that no label shows."""
    return [
        visible(f"{name}: {', '.join(_abridged(settings))}")
        for name, settings in comparison.unnamed_settings.items()
    ]


def mixed_provenance(comparison: Comparison) -> list[str]:
    """Return a line for each mixed part of the provenance of finished runs, with the number of runs by value.

    Entries whose runs were on several devices have a line with the device of their seconds and memory.
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
    mixed += [
        f"{entry.label}: seconds and memory are those of {counted(len(entry.on_one_device), 'run')} on "
        f"{entry.devices[0]} only"
        for entry in comparison.finished
        if len(entry.devices) > 1
    ]
    return [visible(line) for line in mixed]


def definitions(names: Iterable[str]) -> list[str]:
    """Return the definition of each metric, after its name."""
    return [f"{name}: {DEFINITIONS[name]}" for name in names]


def _differing(named: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Return every field in which protocols differ, with each value and whose it is; empty if none."""
    fields = []
    for key, values in differences([identity for _, identity in named]).items():
        held: dict[str, list[str]] = {}
        for (name, _), value in zip(named, values, strict=True):
            held.setdefault("not recorded" if value is None else plain(value), []).append(name)
        words = [
            f"{value} in {', '.join(names)}"
            for value, names in zip(shortened(list(held)), held.values(), strict=True)
        ]
        fields.append(f"{key} ({'; '.join(_abridged(words))})")
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
