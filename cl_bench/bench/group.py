"""What is measured of one strategy: its steps beside the floor's, and what happens between experiences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.benchmark import Measurement

from cl_bench.bench.floor import Floor
from cl_bench.bench.memory import Peak
from cl_bench.bench.subject import Between, Subject
from cl_bench.bench.table import Row
from cl_bench.bench.timing import Spread, alternating, ratios, spread
from cl_bench.bench.turn import turn
from cl_bench.contracts.datamodule import Batch
from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import Strategy
from cl_bench.measure.moments import SecondMoments
from cl_bench.measure.passes import measure
from cl_bench.network.adapters import AdaptedLinear, LowRank
from cl_bench.network.frozen import Frozen
from cl_bench.run.configs import Config

EARLY, LATE = 2, 20
"""Numbers of the experiences whose steps are compared, at the smallest batch: it hides a fixed cost least."""

_EVALUATED = 4  # batches of an evaluation
_PASSED = 4  # batches of a pass for second moments, of which the first goes on to the end of the network


class Timed(NamedTuple):
    """What alternates: a call by its name, the experience and the precision."""

    name: str
    experience: int | None
    precision: str


@dataclass(frozen=True)
class Settings:
    """What a bench measures with.

    Attributes:
        backbone: Arguments of the backbone.
        stream: Arguments of the stream, such as its image size.
        accelerator: As Lightning calls the device.
        precisions: As the Trainer calls them.
        batches: Numbers of images, smallest first.
        rounds: How often each call is timed.
        matrix_rates: Of the device, by precision.
        folder: Where curves are logged, and a run leaves its files.
    """

    backbone: Config
    stream: Config
    accelerator: str
    precisions: Sequence[str]
    batches: Sequence[int]
    rounds: int
    matrix_rates: dict[str, float]
    folder: Path

    def trainer(self, precision: str) -> Config:
        """Return the arguments of a trainer in ``precision``."""
        return {"precision": precision, "accelerator": self.accelerator}


class Group:
    """One strategy in every precision, early and late in the stream, with its floor.

    Args:
        stem: Config of the strategy.
        settings: What to measure with.
        alone: Also measure what does not depend on the strategy: passes, images and evaluation.

    Attributes:
        rows: What has been measured.
        timed: The times of all rounds, by batch and call.
    """

    def __init__(self, stem: str, settings: Settings, *, alone: bool) -> None:
        self.stem = stem
        self.settings = settings
        self.alone = alone
        self.rows: list[Row] = []
        self.timed: dict[int, dict[Timed, Measurement]] = {}
        torch.compiler.reset()  # compiled code of other strategies would count towards torch's limit
        self._subjects = {
            (precision, number): self._subject(precision, number)
            for precision in settings.precisions
            for number in (EARLY, LATE)
        }
        self._kept: dict[tuple[str, int], int] = {}
        self._floors = {
            precision: Floor(
                self._subjects[precision, EARLY].strategy,
                self._subjects[precision, EARLY].stream.classes,
                half=precision.startswith("bf16"),
            )
            for precision in settings.precisions
        }

    def measure(self) -> None:
        """Measure everything."""
        for size in self.settings.batches:
            self._measure_steps(size)
        self._kept = {place: _kept_bytes(one.strategy) for place, one in self._subjects.items()}
        for (precision, number), subject in self._subjects.items():
            self._note_between("before", subject.before, number, precision)
            self._note_between("after", subject.finish(), number, precision)
        for precision in self.settings.precisions:
            self._measure_turn(precision)
        if self.alone:
            for precision in self.settings.precisions:
                self._measure_evaluation(precision)
            self._measure_loading()

    def ratio(self, size: int, over: Timed, under: Timed) -> Spread:
        """Return the ratio of two calls that alternated."""
        timed = self.timed[size]
        return ratios(timed[over].times, timed[under].times)

    def kept_bytes(self, precision: str) -> dict[int, int]:
        """Return what the method keeps beside backbone and adapters in training, by the experience."""
        return {number: self._kept[precision, number] for number in (EARLY, LATE)}

    def master_bytes(self, precision: str) -> int:
        """Return the bytes of frozen weights in full precision beside which there is a copy in half."""
        if not precision.startswith("bf16"):
            return 0
        layers = [
            layer
            for layer in self._subjects[precision, EARLY].strategy.modules()
            if isinstance(layer, Frozen)
        ]
        tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias) if tensor is not None]
        return sum(tensor.nbytes for tensor in tensors)

    def _subject(self, precision: str, number: int) -> Subject:
        settings = self.settings
        return Subject(
            self.stem,
            number,
            backbone=settings.backbone,
            trainer=settings.trainer(precision),
            stream=settings.stream,
            images=settings.batches[-1],
            folder=settings.folder,
        )

    def _calls(self, size: int) -> dict[Timed, Callable[[], object]]:
        calls: dict[Timed, Callable[[], object]] = {}
        for precision, floor in self._floors.items():
            calls[Timed("floor", None, precision)] = _bound(floor.step, self._from_zero(precision, size))
            for number in (EARLY, LATE) if size == self.settings.batches[0] else (EARLY,):
                subject = self._subjects[precision, number]
                calls[Timed("step", number, precision)] = _bound(subject.step, subject.batch(size))
            if self.alone:
                subject = self._subjects[precision, EARLY]
                batch = subject.batch(size)
                calls[Timed("forward", EARLY, precision)] = _bound(subject.forward, batch)
                if isinstance(subject.strategy, LowRankStrategy):
                    layers = subject.strategy.layers
                    calls[Timed("second moments", EARLY, precision)] = _moments(subject, layers, batch)
        return calls

    def _measure_steps(self, size: int) -> None:
        calls = self._calls(size)
        passes = {call: _PASSED for call in calls if call.name == "second moments"}
        self.timed[size] = alternating(calls, self.settings.rounds, passes)
        costs = {call: self._cost(call, size) for call in self.timed[size]}
        for call, measurement in self.timed[size].items():
            floor = Timed("floor", None, call.precision)
            self.rows.append(
                Row(
                    call.name,
                    self.stem,
                    call.experience,
                    call.precision,
                    size,
                    spread(measurement.times),
                    self.ratio(size, call, floor),
                    *costs[call],
                    matrix_rate=self.settings.matrix_rates[call.precision],
                    floor_peak_bytes=costs[floor][0],
                )
            )

    def _cost(self, call: Timed, size: int) -> tuple[int | None, int | None]:
        """Return the peak memory and the operations of a step; None of what is no step."""
        if call.name == "floor":
            floor, batch = self._floors[call.precision], self._from_zero(call.precision, size)
            peak = Peak(batch[0].device)
            held = floor.held_bytes
            with peak.watching():
                floor.step(batch)
            return held + peak.bytes, None
        if call.name != "step" or call.experience is None:
            return None, None
        subject = self._subjects[call.precision, call.experience]
        return subject.peak_bytes(subject.batch(size)), subject.flops(subject.batch(size))

    def _from_zero(self, precision: str, size: int) -> Batch:
        """Return the batch of the early experience, its labels from 0 on as the floor's one head has them."""
        images, labels = self._subjects[precision, EARLY].batch(size)
        return images, labels - labels.min()

    def _note_between(self, when: str, between: Between, number: int, precision: str) -> None:
        size = self.settings.batches[-1]
        if between.passes:
            self._note(f"passes {when}", number, precision, size, [sum(between.passes)])
        self._note(f"work {when}", number, precision, 0, [between.work])

    def _measure_turn(self, precision: str) -> None:
        settings, size = self.settings, self.settings.batches[0]
        seconds, checkpoint = turn(
            self.stem,
            backbone=settings.backbone,
            trainer=settings.trainer(precision),
            stream=settings.stream | {"batch_size": size},
            folder=settings.folder,
        )
        self._note("turn", EARLY, precision, 0, [seconds])
        self._note("checkpoint", EARLY, precision, 0, [checkpoint])

    def _measure_evaluation(self, precision: str) -> None:
        subject = self._subjects[precision, EARLY]
        size = self.settings.batches[-1]
        images = _EVALUATED * size
        calls = {"evaluation": _bound(subject.evaluate, _EVALUATED, size)}
        (seconds,) = alternating(calls, self.settings.rounds).values()
        self._note("evaluation", EARLY, precision, images, seconds.times)

    def _measure_loading(self) -> None:
        subject = self._subjects[self.settings.precisions[0], EARLY]
        subject.stream.enter(subject.stream.experiences[0])
        calls = {"data": lambda: list(subject.stream.loading())}
        (seconds,) = alternating(calls, self.settings.rounds).values()
        size = subject.stream.batch_size
        self.rows.append(Row("data", None, None, "uint8", size, spread(seconds.times)))

    def _note(self, name: str, number: int, precision: str, images: int, times: Sequence[float]) -> None:
        self.rows.append(Row(name, self.stem, number, precision, images, spread(times)))


def _bound(call: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: call(*arguments)


def _kept_bytes(strategy: Strategy) -> int:
    factors = [list(module.parameters()) for module in strategy.modules() if isinstance(module, LowRank)]
    return strategy.stored_bytes - sum(factor.nbytes for pair in factors for factor in pair)


def _moments(subject: Subject, layers: Sequence[AdaptedLinear], batch: Batch) -> Callable[[], object]:
    moments = SecondMoments(layers, dtype=torch.float32)  # as methods take them that ask for energies
    return lambda: measure(subject.strategy.features, [batch] * _PASSED, moments)
