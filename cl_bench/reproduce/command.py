"""The verb ``reproduce``: find or run the cells of a published number, and compare ours with it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from cl_bench.data.published import domainnet, imagenet_r
from cl_bench.errors import sentence
from cl_bench.grid.cells import Cell
from cl_bench.grid.command import Entry as CellEntry
from cl_bench.grid.command import known, run_waiting
from cl_bench.grid.engine import Engine
from cl_bench.network.backbones import Backbone
from cl_bench.report.comparison import Comparison, Entry, comparisons, contrast
from cl_bench.report.statistics import NO_VALUES, TOO_SMALL, Statistic
from cl_bench.report.tables import backbone, counted
from cl_bench.report.text import aligned, difference_interval
from cl_bench.reproduce.cost import duration, seconds, speed
from cl_bench.reproduce.verdicts import TOLERANCE, Claim, Level, standing
from cl_bench.results import published
from cl_bench.results.published import Published, Source
from cl_bench.results.result import Result, read
from cl_bench.run.configs import CONFIGS, config_file, load


@dataclass(frozen=True)
class Wanted:
    """A published number, and the cells to compare with it.

    Attributes:
        strategy: Config stem of the strategy.
        dataset: Config stem of the dataset, or path of a config of that name.
        num_experiences: Length of the stream; None if only one length was published.
        against: Strategy that the contrast subtracts; None for no contrast.
        seeds: Seeds of the cells.
        orders: Class orders of the cells.
        results: Folder of all results.
        overrides: Further command-line words of every cell, such as ``--root=FOLDER``.
    """

    strategy: str
    dataset: str
    num_experiences: int | None
    against: str | None
    seeds: Sequence[int]
    orders: Sequence[str]
    results: Path
    overrides: Sequence[str]

    @property
    def benchmark(self) -> str:
        """Stem of the dataset."""
        return Path(self.dataset).stem

    @property
    def length(self) -> int:
        """Length of the stream.

        Raises:
            ValueError: If it is not given, and none or several were published.
        """
        if self.num_experiences is not None:
            return self.num_experiences
        published.require_known(self.strategy, self.benchmark)
        lengths = {
            row.num_experiences
            for row in published.published()
            if (row.strategy, row.dataset, row.setting) == (self.strategy, self.benchmark, "")
        }
        if len(lengths) != 1:
            raise ValueError(
                f"{self.strategy} on {self.benchmark} was published with "
                f"{' or '.join(map(str, sorted(lengths)))} experiences: give --num_experiences."
            )
        return lengths.pop()

    def cells(self, strategy: str) -> list[Cell]:
        """Return the cells of one strategy, one for each seed and class order."""
        common = (f"--num_experiences={self.length}", f"--results={self.results}", *self.overrides)
        return [
            Cell(strategy, self.dataset, (*common, f"--order={order}", f"--seed={seed}"))
            for seed in self.seeds
            for order in self.orders
        ]


def reproduce(wanted: Wanted, engine: Callable[[Path], Engine], *, dry_run: bool) -> bool:
    """Find or run the cells of a published number, print it with ours, and return whether all are done.

    If the data are missing, no cell runs; what is missing and how long the cells would take is printed.

    Args:
        wanted: The number and its cells.
        engine: Function from the folder of all results to the engine that runs cells.
        dry_run: Run nothing; compare the results that exist.

    Raises:
        ValueError: If no such number was published, or a cell is not valid.
    """
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    rows = {wanted.strategy: published.rows(wanted.strategy, wanted.benchmark, wanted.length)}
    if wanted.against is not None:
        with suppress(ValueError):  # no number of the other strategy is known: there is no contrast
            rows[wanted.against] = published.rows(wanted.against, wanted.benchmark, wanted.length)
    found, missing = _found(wanted, rows)
    complete = dry_run or missing is None
    if missing is not None:
        console.print(f"Nothing can run: {missing}", markup=False)
    else:
        console.print(_progress(found, wanted), markup=False)
        entries = [entry for of_one in found.values() for entry in of_one]
        if not dry_run and any(entry.done is None for entry in entries):
            complete = run_waiting(entries, engine(wanted.results), console)
            found, _ = _found(wanted, rows)
    console.print(_cost(wanted, found, rows), markup=False)
    results = {
        name: [read(entry.done) for entry in entries if entry.done is not None]
        for name, entries in found.items()
    }
    console.print(_page(wanted, rows, results), markup=False)
    return complete


def _found(wanted: Wanted, strategies: Iterable[str]) -> tuple[dict[str, list[CellEntry]], str | None]:
    """Return the cells of every strategy with their state, and what is missing to run them, if anything."""
    try:
        config_file("datamodules", wanted.dataset)
    except (OSError, ValueError) as error:
        return {}, sentence(error)
    found = {name: known(wanted.cells(name)) for name in strategies}
    (first, *_) = found[wanted.strategy]
    try:
        first.configuration.datamodule.setup("fit")
    except (OSError, ValueError) as error:
        return found, sentence(error)
    return found, None


def _progress(found: dict[str, list[CellEntry]], wanted: Wanted) -> str:
    parts = [
        f"{name}: {sum(entry.done is not None for entry in entries)} of {counted(len(entries), 'cell')} done"
        for name, entries in found.items()
    ]
    return f"{'; '.join(parts)}; results in {wanted.results}"


def _cost(wanted: Wanted, found: dict[str, list[CellEntry]], strategies: Iterable[str]) -> str:
    """Return how long the cells that are not done would take here; empty if all are done."""
    cells = len(wanted.seeds) * len(wanted.orders)
    missing = {
        name: sum(entry.done is None for entry in found[name]) if name in found else cells
        for name in strategies
    }
    number = sum(missing.values())
    images = published.sizes(wanted.benchmark)
    if not number:
        return ""
    if images is None:
        return f"{counted(number, 'cell')} not done."
    measured = speed(_backbone(found, wanted))
    total = sum(
        many * seconds(measured, images, _epochs(found, wanted, name), wanted.length)
        for name, many in missing.items()
    )
    return (
        f"{counted(number, 'cell')} not done: about {duration(total)} one after another on this machine "
        f"({measured.device}; measured {1000 * measured.training:.0f} ms an image in training and "
        f"{1000 * measured.evaluation:.0f} ms in evaluation), without the data passes of a strategy and the "
        "reading of images."
    )


def _backbone(found: dict[str, list[CellEntry]], wanted: Wanted) -> Backbone:
    """Return the backbone of the cells with random weights, which are as fast."""
    if not found:
        return Backbone(weights="random")
    settings = found[wanted.strategy][0].configuration.namespace.backbone
    return Backbone(settings.model, weights="random", options=settings.options)


def _epochs(found: dict[str, list[CellEntry]], wanted: Wanted, strategy: str) -> int:
    if strategy in found:
        return int(found[strategy][0].configuration.namespace.trainer.max_epochs)
    recipe = _recipe(wanted, strategy)
    return int(load(recipe)["trainer"]["max_epochs"]) if recipe.exists() else 1


def _recipe(wanted: Wanted, strategy: str) -> Path:
    return CONFIGS / "recipes" / wanted.benchmark / f"{strategy}.yaml"


def reconstructed(wanted: Wanted, strategy: str) -> list[str]:
    """Return the reconstructed parts of ``strategy``, including settings of its recipe."""
    parts = list(published.reconstructed(strategy))
    recipe = _recipe(wanted, strategy)
    if recipe.exists():
        lines = [
            line for line in recipe.read_text(encoding="utf-8").splitlines() if "# reconstructed" in line
        ]
        names = [match[1] for line in lines if (match := re.match(r"\s*(\w+):", line))]
        parts += [f"settings of its recipe ({', '.join(dict.fromkeys(names))})"] if names else []
    return parts


def _page(wanted: Wanted, rows: dict[str, list[Published]], results: dict[str, list[Result]]) -> str:
    compared = comparisons(result for found in results.values() for result in found)
    paragraphs: list[str] = []
    shown: list[Comparison | None] = [*compared] or [None]
    for comparison in shown:
        entries = {name: _entry(comparison, found) for name, found in results.items()}
        if comparison is not None and not comparison.only_protocol:
            paragraphs.append(f"Protocol {comparison.fingerprint}, which shares no table with the others:")
        paragraphs += _of_protocol(wanted, rows, comparison, entries)
    return "\n\n".join(paragraphs)


def _entry(comparison: Comparison | None, results: Sequence[Result]) -> Entry | None:
    groups = {result.group for result in results}
    entries = comparison.entries if comparison is not None else []
    return next((entry for entry in entries if entry.group in groups), None)


def _of_protocol(
    wanted: Wanted,
    rows: dict[str, list[Published]],
    comparison: Comparison | None,
    entries: dict[str, Entry | None],
) -> list[str]:
    paragraphs = []
    for name, found in rows.items():
        entry = entries.get(name)
        levels = [Level(row, NO_VALUES if entry is None else entry.statistic(row.metric)) for row in found]
        paragraphs += [f"{name} on {wanted.benchmark}, {wanted.length} experiences:", _levels(levels)]
        first = next((row.source for row in found if name in row.source.own), None)
        own = [level for level in levels if level.published.source == first]
        departures = [] if first is None or entry is None else _departures(first, comparison)
        paragraphs.append(standing(name, reconstructed(wanted, name), own, departures))
    claims = _claims(wanted, rows, entries)
    if claims:
        paragraphs += [f"{wanted.strategy} minus {wanted.against}, on shared blocks:", _contrasts(claims)]
    remarks = "\n".join(f"- {remark}" for remark in dict.fromkeys(_remarks(rows, comparison, entries)))
    paragraphs.append(f"Known differences of protocol:\n\n{remarks}")
    paragraphs.append(
        f"Level: met within {TOLERANCE} points, or within the printed spread if that is wider. Contrast: met "
        "if our 95 % interval contains the published difference but not zero. All numbers are percentages or "
        "points; ours are means ± sample standard deviations (number of blocks)."
    )
    return paragraphs


def _levels(levels: Sequence[Level]) -> str:
    return aligned(
        [
            ["source", *(level.published.source.title for level in levels)],
            ["metric", *(level.published.metric for level in levels)],
            ["published", *(_with_spread(level.published.mean, level.published.std) for level in levels)],
            ["ours", *(_ours(level.ours) for level in levels)],
            ["95 % interval", *(_interval(level.ours) for level in levels)],
            ["ours − published", *(_signed(level.difference) for level in levels)],
            ["level", *(level.verdict for level in levels)],
        ]
    )


def _claims(
    wanted: Wanted, rows: dict[str, list[Published]], entries: dict[str, Entry | None]
) -> list[Claim]:
    """Return every difference of the two strategies that one source allows."""
    if wanted.against is None or wanted.against not in rows:
        return []
    ours, theirs = entries.get(wanted.strategy), entries.get(wanted.against)
    return [
        Claim(
            first,
            second,
            None if ours is None or theirs is None else contrast(ours, theirs, first.metric),
        )
        for first in rows[wanted.strategy]
        for second in rows[wanted.against]
        if (first.source, first.metric) == (second.source, second.metric)
    ]


def _contrasts(claims: Sequence[Claim]) -> str:
    made = [claim.ours for claim in claims]
    return aligned(
        [
            ["source", *(claim.first.source.title for claim in claims)],
            ["metric", *(claim.first.metric for claim in claims)],
            ["published", *(_signed(claim.published) for claim in claims)],
            ["ours (shared blocks)", *("–" if one is None else _paired(one.difference) for one in made)],
            ["95 % interval", *("–" if one is None else difference_interval(one) for one in made)],
            ["contrast", *(claim.verdict for claim in claims)],
        ]
    )


def _remarks(
    rows: dict[str, list[Published]], comparison: Comparison | None, entries: dict[str, Entry | None]
) -> Iterable[str]:
    blocks = 0 if comparison is None else len(comparison.blocks)
    gathered = [row for found in rows.values() for row in found]
    for name, found in published.by_source(gathered).items():
        source = found[0].source
        yield from (f"{source.title}: {remark}" for remark in source.remarks)
        yield f"{source.title}: {_runs(source)}; ours over {counted(blocks, 'block')} of seed and class order"
        for note in dict.fromkeys(row.note for row in found if row.note):
            yield f"{name}: {note}"
        if comparison is not None:
            yield from _backbones(source, comparison)
            yield from _test_images(source, comparison)
    if any(row.dataset == "domainnet" for row in gathered):
        yield domainnet.UNSAID
    if comparison is None:
        return
    if any(entry is None for entry in entries.values()):
        yield "not every strategy was run under this protocol"


def _departures(source: Source, comparison: Comparison | None) -> list[str]:
    """Return how the protocol of ``comparison`` differs from that of ``source``, as far as it is known."""
    if comparison is None:
        return []
    unsaid = ["which domains it pools is not stated"] if _is_domainnet(comparison) else []
    return [*_backbones(source, comparison), *_test_images(source, comparison), *unsaid]


def _backbones(source: Source, comparison: Comparison) -> Iterable[str]:
    described = comparison.identity.get("backbone", {})
    # Weights from a file or a seed are not those of the tag, whatever the name of the model.
    if described.get("weights") != "pretrained" or source.backbone not in (None, described.get("model")):
        used = source.backbone or "pretrained weights that it does not name"
        yield f"{source.title} used {used}; ours {backbone(comparison.identity)}"


def _test_images(source: Source, comparison: Comparison) -> Iterable[str]:
    run, identity = comparison.results[0], comparison.identity
    evaluated_on = identity.get("evaluated_on", "test")
    if evaluated_on != "test":
        yield f"ours are evaluated on {evaluated_on} images held out of training, not on test images"
        return
    if run.dataset == "imagenet_r" and "test_images" in identity:
        if identity["test_images"] != imagenet_r.SHA256[source.imagenet_r_split, "test"]:
            yield f"{source.title} evaluates on the list {source.imagenet_r_split}, ours on another"
        return
    expected = None if _is_domainnet(comparison) else published.sizes(run.dataset)
    if expected is not None and sum(run.test_images) != expected[1]:
        yield f"ours have {sum(run.test_images):,} test images, the usual list {expected[1]:,}"


def _is_domainnet(comparison: Comparison) -> bool:
    """Return whether the dataset is DomainNet, whose published numbers do not state their variant."""
    return comparison.results[0].dataset == "domainnet"


def _runs(source: Source) -> str:
    number = "an unknown number of runs" if source.runs is None else counted(source.runs, "run")
    return f"{number}, {source.spread}" if source.spread else f"{number}, no spread printed"


def _ours(value: Statistic) -> str:
    return "–" if value.n == 0 else f"{_with_spread(value.mean, value.std)} ({value.n})"


def _with_spread(mean: float, std: float) -> str:
    return f"{mean:.2f}" if math.isnan(std) else f"{mean:.2f} ± {std:.2f}"


def _interval(value: Statistic) -> str:
    if value.n == 0:
        return "–"
    interval = value.interval
    return f"[{interval.low:.2f}, {interval.high:.2f}]" if interval.exists else TOO_SMALL


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.2f}"


def _paired(value: Statistic) -> str:
    return f"{_signed(value.mean)} ({value.n})"
