"""The verb ``cl-bench bench``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch

from cl_bench.bench.group import EARLY, LATE, Group, Settings, Timed
from cl_bench.bench.table import Bench, Row
from cl_bench.bench.timing import Spread, matrix_rate
from cl_bench.errors import suggestion
from cl_bench.loop.checkpoint import EVERY
from cl_bench.loop.provenance import device_name
from cl_bench.network.backbones import Backbone
from cl_bench.run.configs import CONFIGS, Config, load, stems_of
from cl_bench.run.run import quiet

SMALL = "small"
"""Names a transformer of 2.7 million parameters for images of 64 pixels."""

_SMALL: Config = {
    "model": "vision_transformer",
    "options": {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3},
}
_BATCHES = {"cpu": (4, 8), "cuda": (128, 256)}
_SMALL_BATCHES = {"cpu": (64,), "cuda": (512,)}
_TYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}

# ImageNet-R in ten experiences, as most of the papers have it.
_TRAINING_IMAGES, _TEST_IMAGES, _EXPERIENCES = 24_000, 6_000, 10


@dataclass(frozen=True)
class Wanted:
    """What to measure.

    Attributes:
        strategies: Config stems.
        backbone: A timm model without weights, ``small``, or the arguments of a backbone.
        device: ``cpu`` or ``cuda``; the accelerator if there is one unless given.
        precisions: As the Trainer calls them.
        batches: Numbers of images; those of the device if empty.
        rounds: How often each call is timed.
        compiled: Whether the backbone is compiled, for each size of a batch by itself; the floor never is.
    """

    strategies: Sequence[str] = ("lora", "inflora", "keeplora", "janus_lora", "loda")
    backbone: str | Config = "vit_base_patch16_224"
    device: str | None = None
    precisions: Sequence[str] = tuple(_TYPES)
    batches: Sequence[int] = ()
    rounds: int = 6
    compiled: bool = False


def bench(wanted: Wanted, say: Callable[[str], None] = lambda _: None) -> Bench:
    """Measure what is ``wanted``.

    Args:
        wanted: What.
        say: Told what is being measured.

    Raises:
        ValueError: If it cannot be measured.
    """
    device = _device(wanted.device)
    _require_valid(wanted)
    rates = {name: matrix_rate(device, _TYPES[name]) for name in wanted.precisions}
    found = Bench(_in_words(device), rates)
    # Of sizes that change, a run compiles the second for all: it would be timed in place of the one at hand.
    each_size = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
    with TemporaryDirectory() as folder, quiet(), each_size:
        settings = _settings(wanted, device, rates, Path(folder))
        for place, stem in enumerate(wanted.strategies):
            say(f"measuring {stem}, {place + 1} of {len(wanted.strategies)}")
            group = Group(stem, settings, alone=place == 0)
            group.measure()
            found.rows += group.rows
            found.findings += _findings(group)
    found.findings += _whole_runs(found.rows)
    return found


def _settings(wanted: Wanted, device: torch.device, rates: dict[str, float], folder: Path) -> Settings:
    small = wanted.backbone == SMALL
    named: Config = _SMALL if small else {"model": wanted.backbone}
    given = named if isinstance(wanted.backbone, str) else wanted.backbone
    backbone = given | {"weights": "random"}
    if wanted.compiled:
        backbone["compiler"] = "inductor"
    batches = sorted(wanted.batches or (_SMALL_BATCHES if small else _BATCHES)[device.type])
    stream: Config = {"image_size": Backbone(**backbone).image_size, "batch_size": batches[-1]}
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    return Settings(backbone, stream, accelerator, wanted.precisions, batches, wanted.rounds, rates, folder)


def _findings(group: Group) -> Iterator[str]:
    """Yield what follows from the steps of one strategy."""
    for precision in group.settings.precisions:
        yield _growth(group, precision)
        yield from _memory(group, precision)
    for size, timed in group.timed.items():
        for precision in group.settings.precisions:
            moments = Timed("second moments", EARLY, precision)
            if moments in timed:
                over = group.ratio(size, moments, Timed("forward", EARLY, precision))
                yield f"{precision}, batch {size}: a second-moment pass over a forward pass: {_words(over)}"
        if {"32-true", "bf16-mixed"} <= set(group.settings.precisions):
            full, half = Timed("step", EARLY, "32-true"), Timed("step", EARLY, "bf16-mixed")
            faster = _words(group.ratio(size, full, half))
            yield f"{group.stem}, batch {size}: a step in fp32 over one in bf16: {faster}"


def _growth(group: Group, precision: str) -> str:
    size = group.settings.batches[0]
    early, late = Timed("step", EARLY, precision), Timed("step", LATE, precision)
    peaks = {row.experience: row.peak_bytes or 1 for row in group.rows if _is_step(row, precision, size)}
    kept = group.kept_bytes(precision)
    apart = (peaks[LATE] - kept[LATE]) / (peaks[EARLY] - kept[EARLY])
    return (
        f"{group.stem}, {precision}, batch {size}: a step in experience {LATE} over one in {EARLY}: "
        f"{_words(group.ratio(size, late, early))}, peak memory {peaks[LATE] / peaks[EARLY]:.3f}, and "
        f"{apart:.3f} apart from what the method itself keeps, {kept[EARLY] / 1e6:.1f} and "
        f"{kept[LATE] / 1e6:.1f} MB"
    )


def _memory(group: Group, precision: str) -> Iterator[str]:
    """Yield the peaks over the floor's, and how much of them the floor does without."""
    masters, kept = group.master_bytes(precision), group.kept_bytes(precision)
    for row in group.rows:
        if (row.name, row.precision) != ("step", precision) or not row.peak_bytes or not row.floor_peak_bytes:
            continue
        own = kept[row.experience or EARLY]
        apart = (row.peak_bytes - own - masters) / row.floor_peak_bytes
        without = f"the {own / 1e6:.2f} MB that the method itself keeps"
        if masters:
            without += f" and {masters / 1e6:.2f} MB of weights in float32 that merging needs"
        yield (
            f"{group.stem}, {precision}, batch {row.batch}, experience {row.experience}: peak memory "
            f"{row.peak_to_floor:.3f} of the floor's, and {apart:.3f} apart from {without}"
        )


def _is_step(row: Row, precision: str, size: int) -> bool:
    return (row.name, row.precision, row.batch) == ("step", precision, size)


def _whole_runs(rows: Sequence[Row]) -> Iterator[str]:
    """Yield how long runs of published length would take, extrapolated from the rows of the largest batch."""
    evaluations = {row.precision: row.images_per_s for row in rows if row.name == "evaluation"}
    for stem in dict.fromkeys(row.strategy for row in rows if row.strategy):
        for precision, evaluated in evaluations.items():
            own = [row for row in rows if row.strategy == stem and row.precision == precision]
            yield _whole_run(stem, precision, own, evaluated)


def _whole_run(stem: str, precision: str, rows: Sequence[Row], evaluated_per_s: float) -> str:
    epochs = _epochs(stem)
    step = max((row for row in rows if row.name == "step"), key=lambda row: row.batch)
    training = _TRAINING_IMAGES * epochs / step.images_per_s
    passes = _TRAINING_IMAGES * _along(rows, "passes", lambda row: 1 / row.images_per_s)
    evaluation = _TEST_IMAGES * (_EXPERIENCES + 1) / 2 / evaluated_per_s
    took = {row.name: row.median_s for row in rows}
    checkpoints = took["checkpoint"] * min(training / EVERY, _EXPERIENCES * epochs)
    work = _along(rows, "work", lambda row: row.median_s)
    between = _EXPERIENCES * (work + took["turn"]) + checkpoints
    whole = training + passes + evaluation + between
    return (
        f"{stem}, {precision}: ImageNet-R in {_EXPERIENCES} experiences of {epochs} epochs would take "
        f"{whole / 60:.1f} min without loading, extrapolated: training {training / whole:.1%}, data passes "
        f"{passes / whole:.1%}, evaluation {evaluation / whole:.1%}, what else there is between experiences, "
        f"checkpoints included, {between / whole:.2%}"
    )


def _along(rows: Sequence[Row], name: str, value: Callable[[Row], float]) -> float:
    """Return the value of an experience halfway between the early and the late one, summed over rows."""
    return sum(value(row) for row in rows if row.name.startswith(name)) / len((EARLY, LATE))


def _epochs(stem: str) -> int:
    """Return the published number of epochs, and that of InfLoRA where a strategy has none of its own."""
    recipes = CONFIGS / "recipes" / "imagenet_r"
    file = recipes / f"{stem}.yaml"
    return int(load(file if file.exists() else recipes / "inflora.yaml")["trainer"]["max_epochs"])


def _words(ratio: Spread) -> str:
    return f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"There is no device {name!r}. {suggestion(name, ('cpu', 'cuda'))}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch sees no CUDA device here: choose --device cpu, or install its CUDA build.")
    return torch.device(name)


def _require_valid(wanted: Wanted) -> None:
    known = stems_of("strategies")
    for stem in wanted.strategies:
        if stem not in known:
            raise ValueError(f"There is no strategy {stem!r}. {suggestion(stem, known)}")
    name = wanted.backbone
    if isinstance(name, str) and name != SMALL and not timm.is_model(name):
        models = [SMALL, *timm.list_models("vit_*")]
        raise ValueError(f"There is no backbone {name!r}. {suggestion(name, models)}")
    for precision in wanted.precisions:
        if precision not in _TYPES:
            raise ValueError(
                f"There is no precision {precision!r} here. {suggestion(precision, list(_TYPES))}"
            )
    if any(size < 4 for size in wanted.batches):
        raise ValueError("A batch shows images of four classes: give --batch 4 or more.")
    if wanted.rounds < 1:
        raise ValueError(f"{wanted.rounds} rounds measure nothing: give --rounds 1 or more.")


def _in_words(device: torch.device) -> str:
    threads = torch.get_num_threads()
    return f"{device_name(device)}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"
