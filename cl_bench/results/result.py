"""The result file: its schema, the hash of a cell, the fingerprint of a protocol, reading and writing.

Nothing here needs torch or Lightning, so a report reads ten thousand files without importing them.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import operator
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import FailFast, Field, TypeAdapter

from cl_bench.errors import visible
from cl_bench.results import metrics
from cl_bench.results.fields import (
    MOST_BYTES,
    MOST_EXPERIENCES,
    MOST_WHOLE,
    Config,
    Counts,
    Diagnostics,
    Free,
    Identity,
    Name,
    Names,
    Seconds,
    Seed,
    Text,
    Whole,
    parsed,
    validated,
)
from cl_bench.results.files import replaced
from cl_bench.results.tuning import Provenance

SCHEMA = 1
_ADDED_FIELDS = {"diagnostics", "domains", "domain_images", "training_data"}
FILE_NAME = "result.json"

PHASES = ("data_passes", "training", "evaluation", "checkpoints")
"""Phases into which the seconds of a run are split."""

COSTS = (
    "seconds",
    *(f"seconds/{phase}" for phase in PHASES),
    "peak_megabytes",
    "trainable_parameters",
    "stored_megabytes",
)
"""Names of the costs in :meth:`Result.spending`."""

Status = Literal["running", "done", "diverged", "failed"]
Regime = Literal["sequential", "joint"]
TrainingData = Literal["", "none", "features", "images"]

_MOST_PHASES, _MOST_DOMAINS = 100, 1_000
_PerExperience = (FailFast(), Field(max_length=MOST_EXPERIENCES))
_ByDomain = Annotated[list[Counts], FailFast(), Field(max_length=_MOST_DOMAINS)]
_Span = tuple[Whole, Whole]


def digest(value: object) -> str:
    """Return the first 8 hex digits of the sha256 of ``value`` as canonical JSON.

    >>> digest({"b": 1, "a": [1, 2]}) == digest({"a": [1, 2], "b": 1})
    True
    """
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


@dataclass
class Protocol:
    """What decides whether two numbers may be compared.

    Attributes:
        identity: File lists, transforms, weights, precision and so on; equal for all results of one table.
        factors: Seed and class order: the blocks of the statistics, never hashed.
        axes: Dataset and number of experiences: the columns of a table.
    """

    identity: Identity
    factors: Free
    axes: Free

    @property
    def fingerprint(self) -> str:
        """Hash of the identity, 8 hex digits."""
        return digest(self.identity)


@dataclass
class Row:
    """Integer counts of one evaluation: entry ``c`` belongs to the class at position ``c``.

    Attributes:
        correct: Test images whose predicted class, among all classes seen, is right.
        correct_within_experience: Test images predicted right when only classes of the true experience
            compete.
        correct_experience: Test images whose predicted class, right or wrong, is in the true experience.
        correct_by_domain: As ``correct``, separately for each domain; empty if the dataset has none.
    """

    correct: Counts
    correct_within_experience: Counts
    correct_experience: Counts
    correct_by_domain: _ByDomain = field(default_factory=list)


@dataclass
class Cost:
    """The costs of one experience.

    Attributes:
        seconds: Wall-clock seconds by phase: ``data_passes``, ``training``, ``evaluation``, ``checkpoints``.
        trainable_parameters: Number of parameters with a gradient while training.
        stored_bytes: Bytes kept for later experiences, without the pretrained backbone.
        peak_memory_bytes: Peak memory so far: of the accelerator, or resident memory on a CPU.
    """

    seconds: Annotated[dict[Name, Seconds], Field(max_length=_MOST_PHASES)]
    trainable_parameters: Whole
    stored_bytes: Whole
    peak_memory_bytes: Whole


@dataclass
class Result:
    """Everything that one run leaves; ``rows[i]`` is the evaluation after experience ``i``.

    Under the joint regime only the last row exists, and the others are None.

    Attributes:
        strategy: Name of the strategy with its variant, as tables print it.
        dataset: Name of the dataset.
        experiences: First and last-plus-one class position of each experience.
        class_names: Name of the class at each position.
        test_images: Number of test images of the class at each position.
        order: Class order as it appears in paths, such as ``numpy-1993``.
        seed: Seed of everything random except the class order.
        regime: ``sequential``, or ``joint`` for training on all classes at once.
        protocol: What decides which results it may be compared with.
        config: Resolved config of the run without paths, devices and logging: the cell.
        setting: Name of the setting in its grid, if it has one.
        status: ``running``, ``done``, ``diverged`` or ``failed``.
        error: One sentence, if the run did not finish.
        rows: Evaluations, in order.
        costs: Costs of each experience.
        provenance: Versions, device, threads, commit, the hash of the bytes of scanned image files, the
            start and how settings were chosen; shown, never hashed.
        diagnostics: Measurements inside the model after each experience (:mod:`cl_bench.loop.diagnostics`).
        domains: Names of the domains of the test images; empty if the dataset has none.
        domain_images: Number of test images of each domain and of the class at each position.
        training_data: What the strategy keeps of old training data: ``none``, ``features`` or ``images``;
            empty if it was not recorded.
        schema: Version of this layout.
    """

    strategy: Name
    dataset: Name
    experiences: Annotated[list[_Span], *_PerExperience, Field(min_length=1)]
    class_names: Names
    test_images: Counts
    order: Name
    seed: Seed
    regime: Regime
    protocol: Protocol
    config: Config = field(default_factory=dict)
    setting: Name | None = None
    status: Status = "running"
    error: Text | None = None
    rows: Annotated[list[Row | None], *_PerExperience] = field(default_factory=list)
    costs: Annotated[list[Cost], *_PerExperience] = field(default_factory=list)
    provenance: Provenance = field(default_factory=dict)
    diagnostics: Annotated[list[Diagnostics], *_PerExperience] = field(default_factory=list)
    domains: Annotated[Names, Field(max_length=_MOST_DOMAINS)] = field(default_factory=list)
    domain_images: _ByDomain = field(default_factory=list)
    training_data: TrainingData = ""
    schema: int = SCHEMA

    @property
    def num_experiences(self) -> int:
        """Length of the stream, ``T``."""
        return len(self.experiences)

    @property
    def benchmark(self) -> str:
        """Dataset and number of experiences, such as ``digits-T5``."""
        return f"{self.dataset}-T{self.num_experiences}"

    @property
    def cell(self) -> str:
        """Hash of the cell."""
        return digest(self.config)

    @property
    def group(self) -> str:
        """Hash of the cell without seed and class order: equal for runs that are averaged."""
        return digest({key: value for key, value in self.config.items() if key not in ("seed", "order")})

    def counts(self, kind: Literal["correct", "correct_within_experience", "correct_experience"]) -> Matrix:
        """Return the counts of ``kind`` by row and experience, (T, T), NaN where nothing was evaluated."""
        table = np.full((self.num_experiences, self.num_experiences), np.nan)
        for i, row in enumerate(self.rows):
            if row is None:
                continue
            sums = list(accumulate(getattr(row, kind), initial=0))
            seen = [sums[stop] - sums[start] for start, stop in self.experiences if stop < len(sums)]
            table[i, : len(seen)] = seen
        return table

    @property
    def totals(self) -> Vector:
        """Test images per experience, (T,)."""
        return np.array(
            [sum(self.test_images[start:stop]) for start, stop in self.experiences], dtype=np.float64
        )

    def metrics(self) -> dict[str, float]:
        """Return every metric of :data:`metrics.DEFINITIONS`, in percent; NaN if it is undefined."""
        return self.metrics_after(self.num_experiences - 1)

    def metrics_after(self, index: int) -> dict[str, float]:
        """Return every metric as if the stream ended with experience ``index``."""
        seen = slice(index + 1)
        return metrics.summary(
            self.counts("correct")[seen, seen],
            self.totals[seen],
            within=self.counts("correct_within_experience")[seen, seen],
            experience=self.counts("correct_experience")[seen, seen],
        )

    def seconds(self) -> dict[str, float]:
        """Return wall-clock seconds by phase over the whole run."""
        phases: dict[str, float] = {}
        for cost in self.costs:
            for phase, seconds in cost.seconds.items():
                phases[phase] = phases.get(phase, 0.0) + seconds
        return phases

    def spending(self) -> dict[str, float]:
        """Return the costs of the whole run, by the names in ``COSTS``; NaN if they were not measured.

        Seconds are sums over experiences, without those of diagnostics, which no strategy needs. Memory and
        trainable parameters are maxima, storage is that of the last experience.
        """
        if not self.costs:
            return dict.fromkeys(COSTS, math.nan)
        phases = self.seconds()
        return {
            "seconds": sum(seconds for phase, seconds in phases.items() if phase != "diagnostics"),
            **{f"seconds/{phase}": phases.get(phase, math.nan) for phase in PHASES},
            "peak_megabytes": max(cost.peak_memory_bytes for cost in self.costs) / 1e6,
            "trainable_parameters": float(max(cost.trainable_parameters for cost in self.costs)),
            "stored_megabytes": self.costs[-1].stored_bytes / 1e6,
        }

    def write(self, folder: Path, require: Callable[[], None] = lambda: None) -> Path:
        """Write the result file into ``folder``, atomically, and return its path.

        Args:
            folder: Where the file is.
            require: Called before it replaces an earlier one; what it raises keeps that.

        Raises:
            OSError: If it cannot be written; the old file is kept.
        """
        payload = asdict(self) | {
            "cell": self.cell,
            "group": self.group,
            "protocol": asdict(self.protocol) | {"fingerprint": self.protocol.fingerprint},
        }
        path = folder / FILE_NAME
        with replaced(path, require) as file:
            file.write(json.dumps(payload, indent=1).encode())
        return path


Matrix = npt.NDArray[np.float64]
Vector = npt.NDArray[np.float64]


def read(path: Path) -> Result:
    """Read one result file; every reader of results uses this function.

    Raises:
        ValueError: If the file is not a result file of this schema, or contradicts itself.
        OSError: If it cannot be opened.
    """
    try:
        return _from_json(parsed(_content(path)))
    except ValueError as error:
        reason = visible(" ".join(str(error).split()))
        raise ValueError(
            f"{visible(str(path))}: {reason}; run its cell again, or remove the file."
        ) from error


def _content(path: Path) -> bytes:
    with open(path, "rb", opener=_opened) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES:,} bytes")
    return data


def _opened(path: str, flags: int) -> int:
    """Open without waiting, as a named pipe would make a reader wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


@cache
def _adapter() -> TypeAdapter[Result]:
    return TypeAdapter(Result)


def _from_json(payload: dict[str, Any]) -> Result:
    if payload.get("schema") != SCHEMA:
        found = f"has schema {payload['schema']!r}" if "schema" in payload else "has no schema"
        raise ValueError(f"it {found[:40]}, and this version reads schema {SCHEMA}")
    # Older files lack the fields that were added later; their defaults mean that nothing was recorded.
    for name in Result.__dataclass_fields__:
        if name not in payload and name not in _ADDED_FIELDS:
            raise ValueError(f"it has no {name}")
    result: Result = validated(_adapter(), payload)
    _require_experiences(result)
    _require_rows(result)
    return result


def _require_experiences(result: Result) -> None:
    """Require experiences that divide the classes in order, each with test images."""
    classes, spans = len(result.class_names), result.experiences
    in_order = all(start < stop for start, stop in spans) and all(
        before[1] == after[0] for before, after in pairwise(spans)
    )
    if not in_order or spans[0][0] != 0 or spans[-1][1] != classes:
        raise ValueError(f"its experiences do not divide its {classes} classes in order")
    if len(result.test_images) != classes:
        raise ValueError(f"it has {len(result.test_images)} numbers of test images for {classes} classes")
    for images in (result.test_images, *result.domain_images):
        if images and not 0 <= min(images) <= max(images) <= MOST_WHOLE:
            raise ValueError(f"a number of test images is below 0 or above {MOST_WHOLE}")
    if not result.totals.all():
        raise ValueError("an experience has no test images")
    if len(set(result.domains)) < len(result.domains):
        raise ValueError("two of its domains have one name")
    if [len(images) for images in result.domain_images] != [classes] * len(result.domains):
        raise ValueError("its domain_images do not have a number for each domain and class")


def _require_rows(result: Result) -> None:
    """Require rows that fit the experiences, with no more right images than there are."""
    length = result.num_experiences
    for name in ("rows", "costs", "diagnostics"):
        if len(getattr(result, name)) > length:
            raise ValueError(f"it has more {name} than its {length} experiences")
    present = [i for i, row in enumerate(result.rows) if row is not None]
    if result.regime == "joint" and present not in ([], [length - 1]):
        raise ValueError("a joint run has a row only after the last experience")
    needed = [length - 1] if result.regime == "joint" else list(range(length))
    if result.status == "done" and present != needed:
        raise ValueError(f"it is done, but has rows after {len(present)} of {len(needed)} experiences")
    for i in present:
        row = result.rows[i]
        assert row is not None
        seen = result.experiences[i][1]
        images = result.test_images[:seen]
        for counts in (row.correct, row.correct_within_experience, row.correct_experience):
            _require_counts(counts, images, i)
        if len(row.correct_by_domain) not in (0, len(result.domains)):
            raise ValueError(f"row {i} does not have counts for each of its {len(result.domains)} domains")
        for counts, images in zip(row.correct_by_domain, result.domain_images, strict=False):
            _require_counts(counts, images[:seen], i)


def _require_counts(counts: Sequence[int], images: Sequence[int], row: int) -> None:
    if len(counts) != len(images):
        raise ValueError(f"row {row} does not have a count for each of its {len(images)} classes")
    if min(counts) < 0 or not all(map(operator.le, counts, images)):
        raise ValueError(f"row {row} counts fewer right images of a class than 0, or more than there are")


def read_all(folder: Path) -> tuple[list[Result], list[str]]:
    """Return every result below ``folder``, sorted by path, and a sentence for each file that cannot be read.

    Folders whose name begins with a dot, such as those of trials, are left out.

    Raises:
        FileNotFoundError: If it does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no results folder {folder}: run a cell first, or name another folder."
        )
    results: list[Result] = []
    unreadable: list[str] = []
    with without_collector():
        for path in sorted(result_files(folder, unreadable)):
            try:
                results.append(read(path))
            except ValueError as error:
                unreadable.append(str(error))
            except OSError as error:
                unreadable.append(f"{visible(str(path))}: {error.strerror}.")
    return results, unreadable


@contextmanager
def without_collector() -> Iterator[None]:
    """Pause Python's search for cycles: results have none, and it takes a fifth of the time of a report."""
    paused = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if paused:
            gc.enable()


def result_files(folder: Path, unreadable: list[str]) -> Iterator[Path]:
    """Yield every result file below ``folder``, and add a sentence to ``unreadable`` for a closed folder."""
    waiting = [str(folder)]  # not Path.rglob, whose recursion ends before that of folders does
    while waiting:
        inside = waiting.pop()
        try:
            with os.scandir(inside) as entries:
                for entry in entries:
                    if entry.name == FILE_NAME:
                        yield Path(entry.path)
                    elif not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except OSError as error:
            unreadable.append(f"{visible(inside)}: {error.strerror}.")
