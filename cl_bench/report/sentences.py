"""What a table needs said around it: what was compared, what differs, what is absent, what was mixed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cl_bench.report.comparison import DISAGREEING, Block, Comparison, differences, flat, plain, shortened
from cl_bench.results import metrics
from cl_bench.results.result import Result

PROVENANCE = ("python", "versions", "commit", "device", "threads", "images_sha256")
"""Parts of the provenance that are footnoted when mixed; times are always mixed."""

_LISTED = 8  # values in a sentence
_OPTIONS = 80  # characters of a backbone's options


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
    return [f"{name}: {metrics.DEFINITIONS[name]}" for name in names]


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
