"""The result file: its schema, the hash of a cell, the fingerprint of a protocol, reading and writing.

Nothing here needs torch or Lightning, so a report reads ten thousand files without importing them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cl_bench.results import metrics
from cl_bench.results.files import replaced

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

    identity: dict[str, Any]
    factors: dict[str, Any]
    axes: dict[str, Any]

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

    correct: list[int]
    correct_within_experience: list[int]
    correct_experience: list[int]
    correct_by_domain: list[list[int]] = field(default_factory=list)


@dataclass
class Cost:
    """The costs of one experience.

    Attributes:
        seconds: Wall-clock seconds by phase: ``data_passes``, ``training``, ``evaluation``, ``checkpoints``.
        trainable_parameters: Number of parameters with a gradient while training.
        stored_bytes: Bytes kept for later experiences, without the pretrained backbone.
        peak_memory_bytes: Peak memory so far: of the accelerator, or resident memory on a CPU.
    """

    seconds: dict[str, float]
    trainable_parameters: int
    stored_bytes: int
    peak_memory_bytes: int


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
        provenance: Versions, device, threads, commit, the hash of the bytes of scanned image files, and the
            start; shown, never hashed.
        diagnostics: Measurements inside the model, one entry for each experience; empty if there are none.
            See :mod:`cl_bench.loop.diagnostics`.
        domains: Names of the domains of the test images; empty if the dataset has none.
        domain_images: Number of test images of each domain and of the class at each position.
        training_data: What the method keeps of training images: none, features or images; empty if unknown.
        schema: Version of this layout.
    """

    strategy: str
    dataset: str
    experiences: list[tuple[int, int]]
    class_names: list[str]
    test_images: list[int]
    order: str
    seed: int
    regime: Regime
    protocol: Protocol
    config: dict[str, Any] = field(default_factory=dict)
    setting: str | None = None
    status: Status = "running"
    error: str | None = None
    rows: list[Row | None] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    diagnostics: list[dict[str, Any]] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    domain_images: list[list[int]] = field(default_factory=list)
    training_data: str = ""
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
            per_class = getattr(row, kind)
            for j, (start, stop) in enumerate(self.experiences):
                if stop <= len(per_class):
                    table[i, j] = sum(per_class[start:stop])
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

    def write(self, folder: Path) -> Path:
        """Write the result file into ``folder``, atomically, and return its path.

        Raises:
            OSError: If it cannot be written; the old file is kept.
        """
        payload = asdict(self) | {
            "cell": self.cell,
            "group": self.group,
            "protocol": asdict(self.protocol) | {"fingerprint": self.protocol.fingerprint},
        }
        path = folder / FILE_NAME
        with replaced(path) as file:
            file.write(json.dumps(payload, indent=1).encode())
        return path


Matrix = npt.NDArray[np.float64]
Vector = npt.NDArray[np.float64]


def read(path: Path) -> Result:
    """Read one result file.

    Raises:
        ValueError: If the file is not a result file of this schema.
    """
    try:
        payload: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if payload["schema"] == SCHEMA:
            return _from_json(payload)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a result file: run its cell again, or remove it.") from error
    raise ValueError(
        f"{path} has schema {payload['schema']}, and this version reads {SCHEMA}: run the cell again."
    )


def _from_json(payload: Mapping[str, Any]) -> Result:
    # Older files lack the fields that were added later; their defaults mean that nothing was recorded.
    added = _ADDED_FIELDS - payload.keys()
    fields = {name: payload[name] for name in Result.__dataclass_fields__ if name not in added}
    protocol = payload["protocol"]
    return Result(
        **fields
        | {
            "protocol": Protocol(protocol["identity"], protocol["factors"], protocol["axes"]),
            "experiences": [(start, stop) for start, stop in payload["experiences"]],
            "rows": [None if row is None else Row(**row) for row in payload["rows"]],
            "costs": [Cost(**cost) for cost in payload["costs"]],
        }
    )


def read_all(folder: Path) -> tuple[list[Result], list[str]]:
    """Return every result below ``folder``, sorted by path, and a sentence for each file that cannot be read.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no results folder {folder}: run a cell first, or name another folder."
        )
    results, unreadable = [], []
    for path in sorted(folder.rglob(FILE_NAME)):
        try:
            results.append(read(path))
        except ValueError as error:
            unreadable.append(str(error))
    return results, unreadable
