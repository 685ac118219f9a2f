"""What ``cl-bench bench`` measures: steps in alternation with the floor, and what an experience adds."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from scipy.stats import quantile_test
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

from cl_bench.bench.floor import Floor, Unmeasurable
from cl_bench.bench.subject import CLASSES, RECIPES, Setup, Subject
from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import Strategy
from cl_bench.data.experience import Batch
from cl_bench.errors import suggestion
from cl_bench.loop.checkpoint import EVERY
from cl_bench.loop.provenance import device_name
from cl_bench.measure.moments import SecondMoments
from cl_bench.measure.passes import measure
from cl_bench.network.adapters import LowRank
from cl_bench.network.backbones import Backbone
from cl_bench.network.frozen import Frozen
from cl_bench.run.configs import Config, load, stems_of
from cl_bench.run.run import quiet

SMALL = "small"
"""Names a transformer of 2.7 million parameters for images of 64 pixels."""

EARLY, LATE = 2, 20
"""Numbers of the experiences to compare, at the smallest batch: it hides a fixed cost least."""

_SMALL: Config = {
    "model": "vision_transformer",
    "options": {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3},
}
_BATCHES = {"cpu": [4, 8], "cuda": [128, 256]}
_SMALL_BATCHES = {"cpu": [64], "cuda": [512]}
_TYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}
_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices that measure the rate of a device
_PASSED = 4  # batches of a pass for second moments; only the first goes through the whole network
_CERTAIN = 6  # values whose range holds the median in 95 % of all cases: 1 - 2 / 2**6

# Images that one of ten experiences of ImageNet-R trains on and, on average, evaluates.
_TRAINED, _EVALUATED = 2_400, 3_300

Row = dict[str, Any]
"""One measurement: its figures by name, and the seconds of each round under ``times``."""

_FORMATS = {
    **dict.fromkeys(("name", "strategy", "experience", "precision", "batch"), ""),
    **{"median_s": ".4f", "images_per_s": ".1f", "of_matrix_rate": ".0%"},
    **dict.fromkeys(("ratio_to_floor", "ratio_low", "ratio_high", "peak_to_floor", "rest_to_floor"), ".3f"),
    **dict.fromkeys(("peak_bytes", "kept_bytes", "master_bytes"), ","),
}
_WORDS = 4  # columns, aligned to the left
_LEGEND = (
    "The method itself keeps kept_bytes; merging needs master_bytes, frozen weights in float32, which the "
    "floor does without; the rest is the peak without both."
)


@dataclass
class Bench:
    """Everything that one bench found.

    Attributes:
        device: What it ran on, in words.
        matrix_rates: Floating-point operations a second of a large product at its fastest, or of a step if
            one was faster, by precision.
        rows: Measurements.
        findings: What follows from them, a sentence each.
    """

    device: str
    matrix_rates: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def json(self) -> str:
        """Return the rows as JSON; the matrix rate is that of the fastest precision measured."""
        rows = [{key: row.get(key) for key in _FORMATS} for row in self.rows]
        rate = max(self.matrix_rates.values()) / 1e12
        return json.dumps({"rows": rows, "device": self.device, "matrix_tflops": rate}, indent=1)

    def text(self) -> str:
        """Return a table of the rows, and the findings below it."""
        rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {name}" for name, rate in self.matrix_rates.items())
        columns = []
        for place, (key, form) in enumerate(_FORMATS.items()):
            cells = [key, *(f"{row[key]:{form}}" if row.get(key) else "–" for row in self.rows)]
            columns.append([f"{cell:{'<>'[place >= _WORDS]}{max(map(len, cells))}}" for cell in cells])
        table = ["  ".join(line) for line in zip(*columns, strict=True)]
        head = f"{self.device}; a large product of matrices runs at {rates}"
        return "\n".join([head, "", *table, "", _LEGEND, "", *self.findings])


def bench(options: Namespace, report: Callable[[str], None] = lambda _: None) -> Bench:
    """Measure what the options of the verb ask for.

    Args:
        options: See :mod:`cl_bench.bench.options`.
        report: Called with a line before each strategy.

    Raises:
        ValueError: If it cannot be measured.
    """
    # After a change of size, torch would compile once for all sizes, and that would be timed instead.
    each_size = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
    with TemporaryDirectory() as folder, quiet(), each_size:
        setup = _setup(options, Path(folder))
        threads = torch.get_num_threads()
        words = f"{threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"
        found = Bench(f"{device_name(setup.device)}, {words}")
        for done, stem in enumerate(options.strategies):
            report(f"measuring {stem}, {done + 1} of {len(options.strategies)}")
            rows: list[Row] = []
            for precision in setup.precisions:
                rows += measurements(stem, EARLY, precision, setup, passes=not done)
                rows += measurements(stem, LATE, precision, setup)
            found.rows += rows
            found.findings += _findings(stem, rows, setup)
        found.matrix_rates = add_shares(found.rows)
    return found


def _setup(options: Namespace, folder: Path) -> Setup:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _require_known("device", [device], list(_BATCHES))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch sees no CUDA device here: choose --device cpu, or install its CUDA build.")
    _require_known("strategy", options.strategies, stems_of("strategies"))
    _require_known("precision", options.precisions, list(_TYPES))
    if any(size < 4 for size in options.batches):
        raise ValueError("A batch shows images of four classes: give --batch 4 or more.")
    if options.rounds < 1:
        raise ValueError(f"{options.rounds} rounds measure nothing: give --rounds 1 or more.")
    model, usual = {"model": options.backbone}, _BATCHES
    if options.backbone == SMALL:
        model, usual = _SMALL, _SMALL_BATCHES
    elif not timm.is_model(options.backbone):
        _require_known("backbone", [options.backbone], [SMALL, *timm.list_models("vit_*")])
    backbone = model | {"weights": "random"} | ({"compiler": "inductor"} if options.compiled else {})
    size, batches = Backbone(**backbone).image_size, sorted(options.batches or usual[device])
    return Setup(backbone, size, torch.device(device), options.precisions, batches, options.rounds, folder)


def _require_known(kind: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"There is no {kind} {name!r}. {suggestion(name, known)}")


def measurements(stem: str, number: int, precision: str, setup: Setup, passes: bool = False) -> list[Row]:
    """Measure the steps of one experience, a large product of matrices, and what surrounds the steps.

    With ``passes``, also measure what no strategy changes: single passes over a batch, and its loading.

    Raises:
        Unmeasurable: If the strategy has no step that can be compared with the floor.
    """
    subject, rows = Subject(stem, number, precision, setup), list[Row]()
    place = {"strategy": stem, "experience": number, "precision": precision}

    def steps() -> Iterator[Batch]:
        strategy, half = subject.strategy, precision.startswith("bf16")
        floor = Floor(strategy, CLASSES, half=half)
        # A floor in float32 alternates with both precisions, which are compared by their ratios to it.
        full = Floor(strategy, CLASSES, half=False) if half and "32-true" in setup.precisions else None
        a, b = matrices(setup.device, _TYPES[precision])
        for size in setup.batches if number == EARLY else setup.batches[:1]:
            batch = images, labels = subject.stream.batch(size)
            from_zero = images, labels - labels.min()
            calls: dict[str, Callable[[], object]] = {
                "floor": partial(floor.step, from_zero),
                "product": partial(torch.matmul, a, b),
            }
            if full is not None:
                calls["fp32 floor"] = partial(full.step, from_zero)
            if passes:
                calls |= _passes(strategy, batch)
                calls["loading"] = lambda: list(subject.stream.loading())
            seconds: dict[str, list[float]] = {name: [] for name in ("floor", "step", *calls)}
            for name in turns(seconds, setup.rounds):
                if name == "step":
                    yield batch
                else:
                    calls[name]()
            with watched(floor.model, floor.optimizer) as peaks:
                floor.step(from_zero)
            floor_bytes = peaks[0] - floor.unused_bytes
            with watched(strategy, subject.trainer.optimizers[0]) as peaks:
                yield batch
            # The counter knows the products of plain attention and of code that is not compiled.
            counter = FlopCounterMode(display=False)
            with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), counter:
                yield batch
            memory = _memory(strategy, peaks[0], floor_bytes, half)
            figures: dict[str, Row] = {
                "step": memory | {"operations": counter.get_total_flops()},
                "floor": {"peak_bytes": floor_bytes, "peak_to_floor": 1.0},
                "product": {"operations": 2 * len(a) ** 3},
            }
            for name, times in seconds.items():
                of_one = [one / (_PASSED if name == "second moments" else 1) for one in times]
                images_seen = 0 if name == "product" else size
                row = timing(name, images_seen, of_one, seconds["floor"])
                rows.append(place | row | figures.get(name, {}))

    took = subject.run(steps())
    if not rows:
        raise Unmeasurable(f"{stem} trains nothing, so it has no step to measure.")
    images = {"passes": setup.batches[-1], "evaluation": sum(subject.stream.test_images)}
    rows += [place | timing(name, images.get(name, 0), [spent]) for name, spent in took.items() if spent]
    return rows


def _passes(strategy: Strategy, batch: Batch) -> dict[str, Callable[[], object]]:
    """Return a forward pass on ``batch``, and a pass for second moments if the strategy has adapters."""

    @torch.no_grad()
    def forward() -> None:
        strategy.features(batch[0])

    if not isinstance(strategy, LowRankStrategy):
        return {"forward": forward}
    moments = SecondMoments(strategy.layers, dtype=torch.float32)  # as for thresholds on energies
    passed = [batch] * _PASSED
    return {"forward": forward, "second moments": lambda: measure(strategy.features, passed, moments)}


def _findings(stem: str, rows: Sequence[Row], setup: Setup) -> Iterator[str]:
    """Yield what follows from the rows of one strategy, a sentence each."""
    at = {(row["precision"], row["name"], row["experience"], row["batch"]): row["to_floor"] for row in rows}
    for precision in setup.precisions:
        size = setup.batches[0]
        late, early = (at[precision, "step", number, size] for number in (LATE, EARLY))
        over = _words(ratios(late, early))
        yield f"{stem}, {precision}, batch {size}: a step in experience {LATE} over one in {EARLY}: {over}"
        yield _cost(stem, precision, [row for row in rows if row["precision"] == precision])
    for size in setup.batches:
        for precision in setup.precisions:
            if moments := at.get((precision, "second moments", EARLY, size)):
                over = _words(ratios(moments, at[precision, "forward", EARLY, size]))
                yield f"{precision}, batch {size}: a second-moment pass over a forward pass: {over}"
        if full_floor := at.get(("bf16-mixed", "fp32 floor", EARLY, size)):
            full, half = (at[precision, "step", EARLY, size] for precision in _TYPES)
            over = _words(ratios(full, ratios(half, full_floor)))
            yield f"{stem}, batch {size}: a step in fp32 over one in bf16: {over}"


def _cost(stem: str, precision: str, rows: Sequence[Row]) -> str:
    """Return what an experience of published length costs, from what single images and hooks take."""

    def took(name: str) -> float:  # halfway between the early and the late experience
        own = (row["median_s"] / (row["batch"] or 1) for row in rows if row["name"] == name)
        return float(sum(own)) / len((EARLY, LATE))

    recipe = RECIPES / f"{stem}.yaml"  # without one, the epochs of InfLoRA
    epochs = load(recipe if recipe.exists() else RECIPES / "inflora.yaml")["trainer"]["max_epochs"]
    step = max((row for row in rows if row["name"] == "step"), key=lambda row: float(row["batch"]))
    training = epochs * _TRAINED / step["images_per_s"]
    parts = {
        "training": training,
        "data passes": _TRAINED * took("passes"),
        "evaluation": _EVALUATED * took("evaluation"),
        "all else": took("work") + took("overhead") + took("checkpoint") * min(training / EVERY, epochs),
    }
    whole = sum(parts.values())
    shares = ", ".join(f"{name} {part / whole:.2%}" for name, part in parts.items())
    return (
        f"{stem}, {precision}: an experience of ImageNet-R, {_TRAINED} images and {epochs} epochs, takes "
        f"{whole / 60:.1f} min without loading: {shares}"
    )


def turns(seconds: dict[str, list[float]], rounds: int) -> Iterator[str]:
    """Yield the names in ``seconds``, and append to each the seconds until the caller asks for the next.

    A round has every name once, in an order that changes: whatever slows the machine slows them all. One
    round before the others warms up. The seconds include the work of the accelerator.
    """
    order = list(seconds)
    shuffle = random.Random(0).shuffle
    for counted in range(rounds + 1):
        shuffle(order)
        for name in order:
            began = timer()
            yield name
            if counted:
                seconds[name].append(timer() - began)


def timing(name: str, batch: int, times: Sequence[float], floor_times: Sequence[float] = ()) -> Row:
    """Return a row with the times of a call; ``batch`` is 0 if it sees no images.

    >>> timing("step", 8, [2.0, 4.0, 60.0], [1.0, 2.0, 20.0])["ratio_to_floor"]
    2.0
    """
    to_floor, seconds = ratios(times, floor_times or times), median(times)
    row = {"name": name, "batch": batch, "times": times, "to_floor": to_floor, "median_s": seconds}
    if batch:
        row["images_per_s"] = batch / seconds
    if floor_times:
        row |= zip(("ratio_to_floor", "ratio_low", "ratio_high"), spread(to_floor), strict=True)
    return row


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Return the ratio of two calls in each round."""
    return [above / below for above, below in zip(over, under, strict=True)]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of ``values`` and the ends of its 95 % interval, whatever their distribution.

    Fewer than six values cannot be that certain: they give their range.

    >>> spread([float(value) for value in range(1, 10)]), spread([3.0, 1.0, 2.0])
    ((5.0, 2.0, 8.0), (2.0, 1.0, 3.0))
    """
    if len(values) < _CERTAIN:
        return median(values), min(values), max(values)
    low, high = quantile_test(values).confidence_interval()
    return median(values), float(low), float(high)


def _words(values: Sequence[float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*spread(values))


def matrices(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return two square matrices whose product a device computes at its best rate."""
    side = _SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.rand(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    return a, b


def add_shares(rows: Sequence[Row]) -> dict[str, float]:
    """Add ``of_matrix_rate`` to the rows with ``operations``, and return the rate of each precision.

    The rate is the highest of any round, of a product or of a step, so no share passes one: a product that
    the machine slowed in every round would make it too low.

    >>> step = {"precision": "32-true", "operations": 6.0, "times": [2.0, 3.0], "median_s": 2.5}
    >>> add_shares([step, {"precision": "32-true", "operations": 8.0, "times": [2.0, 4.0], "median_s": 3.0}])
    {'32-true': 4.0}
    >>> step["of_matrix_rate"]
    0.6
    """
    counted = [row for row in rows if "operations" in row]
    rates: dict[str, float] = {}
    for row in counted:
        rate = row["operations"] / min(row["times"])
        rates[row["precision"]] = max(rate, rates.get(row["precision"], 0.0))
    for row in counted:
        row["of_matrix_rate"] = row["operations"] / row["median_s"] / rates[row["precision"]]
    return rates


@contextmanager
def watched(model: nn.Module, optimizer: Optimizer) -> Iterator[list[int]]:
    """Yield a list that gets, at the end, the most bytes that model, optimizer and context took together.

    On a CPU these are the tensors, without what a library allocates inside a product.
    """
    peak, device = [held_bytes(model, optimizer)], next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak[0] += torch.cuda.max_memory_allocated(device) - before
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        yield peak
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    changes = (event.nbytes() for event in events if event.name() == "[memory]")
    peak[0] += max(accumulate(changes, initial=0))


def held_bytes(model: nn.Module, optimizer: Optimizer) -> int:
    """Return the bytes of all tensors of model, gradients and optimizer, plain attributes included."""
    tensors: list[object] = [*model.parameters(), *model.buffers()]
    tensors += [parameter.grad for parameter in model.parameters()]
    tensors += [value for part in model.modules() for value in vars(part).values()]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _memory(strategy: Strategy, peak: int, floor_peak: int, half: bool) -> dict[str, float]:
    """Return the peak of a step, compared with the floor's, and how much of it the floor does without."""
    adapters = [adapter for adapter in strategy.modules() if isinstance(adapter, LowRank)]
    kept = strategy.stored_bytes - sum(factor.nbytes for one in adapters for factor in one.parameters())
    frozen = [layer for layer in strategy.modules() if isinstance(layer, Frozen)] if half else []
    masters = sum(one.nbytes for layer in frozen for one in (layer.weight, layer.bias) if one is not None)
    return {
        "peak_to_floor": peak / floor_peak,
        "rest_to_floor": (peak - kept - masters) / floor_peak,
        "peak_bytes": peak,
        "kept_bytes": kept,
        "master_bytes": masters,
    }
