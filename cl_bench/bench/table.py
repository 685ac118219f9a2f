"""What a bench found: rows of measurements and ratios between them, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from cl_bench.bench.timing import Spread

_KEYS = (
    "name",
    "strategy",
    "experience",
    "precision",
    "batch",
    "median_s",
    "ratio_to_floor",
    "images_per_s",
    "peak_bytes",
)
_HEADINGS = (
    "what",
    "strategy",
    "experience",
    "precision",
    "batch",
    "median",
    "interval",
    "of the floor",
    "interval",
    "images/s",
    "peak MB",
    "of the floor's",
    "of matrix rate",
)
_LEFT = 4  # columns of words


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        name: What was measured.
        strategy: Config of the strategy; None where it plays no part.
        experience: Number of the experience, from 1; None likewise.
        precision: As the Trainer calls it.
        batch: Images; 0 of what sees none.
        seconds: What it took.
        to_floor: The same over the floor's, round by round, where both alternated.
        peak_bytes: The most memory that it needs together with all that is kept for it.
        flops: Floating-point operations of its products.
        matrix_rate: Of the device in this precision, floating-point operations a second.
        floor_peak_bytes: What the floor needs.
    """

    name: str
    strategy: str | None
    experience: int | None
    precision: str
    batch: int
    seconds: Spread
    to_floor: Spread | None = None
    peak_bytes: int | None = None
    flops: int | None = None
    matrix_rate: float | None = None
    floor_peak_bytes: int | None = None

    @property
    def median_s(self) -> float:
        """Median of the seconds."""
        return self.seconds.median

    @property
    def ratio_to_floor(self) -> float | None:
        """Median ratio to the floor."""
        return None if self.to_floor is None else self.to_floor.median

    @property
    def images_per_s(self) -> float:
        """Images a second."""
        return self.batch / self.seconds.median

    @property
    def peak_to_floor(self) -> float | None:
        """Peak memory over the floor's."""
        if self.peak_bytes is None or self.floor_peak_bytes is None:
            return None
        return self.peak_bytes / self.floor_peak_bytes

    def cells(self) -> list[str]:
        """Return the row as the table prints it."""
        share = self.flops and self.matrix_rate and self.flops / self.seconds.median / self.matrix_rate
        to_floor = self.peak_to_floor
        return [
            self.name,
            self.strategy or "–",
            "–" if self.experience is None else str(self.experience),
            self.precision,
            str(self.batch or "–"),
            _seconds(self.seconds.median),
            f"{_seconds(self.seconds.low)} to {_seconds(self.seconds.high)}",
            *(["–", "–"] if self.to_floor is None else _ratio(self.to_floor)),
            f"{self.images_per_s:.1f}" if self.batch else "–",
            "–" if self.peak_bytes is None else f"{self.peak_bytes / 1e6:.1f}",
            "–" if to_floor is None else f"{to_floor:.3f}",
            f"{share:.0%}" if share else "–",
        ]


@dataclass
class Bench:
    """Everything that one bench found.

    Attributes:
        device: What it ran on, in words.
        matrix_rates: Floating-point operations a second of a large product, by precision.
        rows: Measurements.
        findings: What follows from them, a sentence each.
    """

    device: str
    matrix_rates: dict[str, float]
    rows: list[Row] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def json(self) -> str:
        """Return the rows as JSON; the matrix rate is that of the fastest precision measured."""
        rows = [{key: getattr(row, key) for key in _KEYS} for row in self.rows]
        rate = max(self.matrix_rates.values()) / 1e12
        return json.dumps({"rows": rows, "device": self.device, "matrix_tflops": rate}, indent=1)

    def text(self) -> str:
        """Return a table with medians, intervals and ratios, and the findings below it."""
        rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {name}" for name, rate in self.matrix_rates.items())
        head = f"{self.device}; a large product of matrices runs at {rates}"
        return "\n".join(
            [head, "", *aligned(_HEADINGS, [row.cells() for row in self.rows]), "", *self.findings]
        )


def aligned(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines, words to the left and numbers to the right.

    >>> aligned(["what", "a", "b", "precision", "images"], [["step", "x", "2", "32-true", "8"]])
    ['what  a  b  precision  images', 'step  x  2  32-true         8']
    """
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < _LEFT else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [headings, *rows]
    ]


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _ratio(ratio: Spread) -> list[str]:
    return [f"{ratio.median:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}"]
