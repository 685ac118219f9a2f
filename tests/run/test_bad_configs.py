"""Mutated shipped configs: each works or is refused in one line, without a traceback and without hanging."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import math
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from datetime import date
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest
import yaml

from cl_bench.__main__ import main
from cl_bench.run.configs import CONFIGS, load
from cl_bench.run.configuration import layers, resolve

SECONDS = 60  # limit of a command, which takes a tenth of a second on an idle machine
MEMORY = 12 * 2**30

Config = dict[Any, Any]
Place = tuple[Any, ...]

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**9, -(10**9), 2**31, 2**63, 2**64),
    *(0.0, 0.5, -0.5, 1.5, 1e-30, 1e300, math.inf, -math.inf, math.nan),
    *(
        "",
        " ",
        "yes",
        "null",
        "3",
        "1e3",
        "-1",
        "nan",
        "é中",
        "a b",
        "a/b",
        "..",
        "/",
        "~",
        "x" * 3000,
        "\0",
        "\n",
        "'",
        "{",
    ),
    *(
        "lora",
        "identity",
        "numpy:",
        "numpy:-1",
        "numpy:x",
        "python:99999999999999999999",
        "auto",
        "gpu",
        "cpu",
    ),
    *(
        "os.system",
        "strategies.lora.LoRA",
        "torch.optim.SGD",
        "strategies",
        "strategies.",
        ".LoRA",
        "no.such.Thing",
    ),
    *(
        [],
        [1],
        ["a"],
        [None],
        [[1]],
        [0, 0],
        [-1],
        [5, 4, 3, 2, 1, 0],
        list(range(8)),
        ["q", "k"],
        ["blocks.0"],
    ),
    *(
        {},
        {"a": 1},
        {"class_path": "os.system"},
        {"class_path": "torch.optim.SGD"},
        {"class_path": 3},
        {"class_path": None},
    ),
    {"class_path": "torch.optim.Adam", "init_args": {"lr": "fast"}},
    {"class_path": "torch.optim.Adam", "init_args": {"lr": -1.0}},
    {"class_path": "torch.optim.Adam", "init_args": {"speed": 1}},
    {"class_path": "torch.optim.LBFGS", "init_args": {"lr": 1.0}},
    {"class_path": "torch.optim.lr_scheduler.StepLR"},
    {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 0}},
    {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 0}},
    {"class_path": "cl_bench.maths.schedules.QuarterCosine", "init_args": {"epochs": -1}},
    {"init_args": {"lr": 1}},
    {"img_size": 16, "patch_size": 0, "embed_dim": 32, "depth": 2, "num_heads": 2},
    {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 0, "num_heads": 2},
    {"img_size": 16, "patch_size": 8, "embed_dim": 33, "depth": 1, "num_heads": 2},
    {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 10**9, "num_heads": 2},
    *(date(2020, 1, 1), b"bytes", {1: 2}, {None: 1}, {"": 1}),
]


KINDS = ("trainer", "strategies", "strategies", "datamodules", "recipes", "grids")
SCRAPS = ["\t", ":", "[", "'", "&a ", "*a ", "!!python/object:os.system ", "\0", "- ", "{", "---\n"]

DEEP = (  # enough blocks for every recipe
    "--backbone.options={img_size: 16, patch_size: 8, embed_dim: 32, depth: 5, num_heads: 2}",
)
ONE_BATCH = (
    "--results=results",
    "--wandb=false",
    "--num_workers=0",
    "--trainer.devices=1",  # more would start other processes
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=1",
)


@cache
def shipped(kind: str) -> list[tuple[str, Path]]:
    """Return the shipped configs of a kind, each with the name of its folder (for recipes, the dataset)."""
    found = [CONFIGS / "trainer.yaml"] if kind == "trainer" else sorted((CONFIGS / kind).rglob("*.yaml"))
    return [(path.parent.name, path) for path in found]


@cache
def known(kind: str, stem: str) -> list[tuple[Place, Any]]:
    """Return the places of a config from which values are read, each with its default."""
    if kind == "grids":
        lists = ("strategies", "datasets", "orders", "seeds")
        return [((name,), []) for name in lists] + [
            (("settings",), {}),
            (("common",), {}),
            (("results",), "a"),
        ]
    strategy = stem if kind in ("strategies", "recipes") else "lora"
    configuration = resolve(layers(strategy, stem if stem == "digits" else "toy"))
    return [(place(key), configuration.namespace.get(key)) for key in configuration.schema.keys]


def place(key: str) -> Place:
    group, _, rest = key.partition(".")
    parts = tuple(rest.split(".")) if rest else ()
    return (group, "init_args", *parts) if group in ("model", "data") and parts else (group, *parts)


def places(config: Any) -> list[Place]:
    """Return every place in a config, outermost first."""
    found: list[Place] = []
    items = (
        config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    )
    for key, value in items:
        found += [(key,), *((key, *below) for below in places(value))]
    return found


def put(config: Config, where: Place, value: Any) -> None:
    """Set the value at a place, and create the mappings that contain it."""
    inside: Any = config
    for key, following in pairwise(where):
        below = inside.get(key) if isinstance(inside, dict) else inside[key]
        if not isinstance(below, list if isinstance(following, int) else dict):
            inside[key] = {}
        inside = inside[key]
    inside[where[-1]] = value


def drop(config: Config, where: Place) -> Any:
    """Remove a place and return its value."""
    inside: Any = config
    for key in where[:-1]:
        inside = inside[key]
    return inside.pop(where[-1])


@dataclass(frozen=True)
class Mutant:
    """A config with mistakes.

    Attributes:
        kind: Kind of the config: trainer, strategies, datamodules, recipes or grids.
        dataset: Config stem of the dataset of a recipe.
        file: Its path below the configs.
        text: Its content.
        trained: Whether to train with it as well.
    """

    kind: str
    dataset: str
    file: Path
    text: str
    trained: bool

    @property
    def stem(self) -> str:
        return self.file.stem


def mutant(random: Random) -> Mutant:
    """Draw a shipped config and mutate it, as a tree and sometimes as text."""
    kind = random.choice(KINDS)
    dataset, path = random.choice(shipped(kind))
    config = load(path)
    if kind == "grids":
        config["seeds"] = [1]
    plausible = random.random() < 0.5
    for _ in range(random.choice([1, 1, 2, 3])):
        if plausible:
            where, default = random.choice(known(kind, path.stem))
            put(config, where, near(random, default))
        else:
            mutate(random, kind, path.stem, config)
    text = yaml.safe_dump(config, allow_unicode=True, sort_keys=False)
    if not plausible and random.random() < 0.1:
        at = random.randint(0, len(text))
        text = text[:at] + random.choice(SCRAPS) + text[at:]
    trained = random.random() < (0.4 if plausible else 0.1)
    return Mutant(kind, dataset, path.relative_to(CONFIGS), text, trained)


def mutate(random: Random, kind: str, stem: str, config: Config) -> None:
    """Change one place of a config."""
    there = places(config)
    how = random.choice(["replace", "replace", "known", "known", "drop", "rename", "extra"])
    if how == "known" or not there:
        where, default = random.choice(known(kind, stem))
        put(config, where, other(random, default))
        return
    where = random.choice(there)
    if how == "extra":
        put(config, (*where[:-1], "extra" if isinstance(where[-1], str) else 0), chosen(random, VALUES))
        return
    old = drop(config, where)
    if how == "rename" and isinstance(where[-1], str):
        put(config, (*where[:-1], misspelt(random, where[-1])), old)
    elif how == "replace" and isinstance(where[-1], str):
        put(config, where, other(random, old))


def misspelt(random: Random, word: str) -> str:
    at = random.randrange(max(1, len(word)))
    return random.choice([word[:at] + word[at + 1 :], word[:at] + "x" + word[at:], word.upper(), word + "_"])


def other(random: Random, old: Any) -> Any:
    """Draw a value to replace ``old``, similar or arbitrary."""
    return near(random, old) if random.random() < 0.5 else chosen(random, VALUES)


def near(random: Random, old: Any) -> Any:
    """Draw a value close to ``old``, or of its type."""
    close: list[Any] = []
    if isinstance(old, str) and old:
        close = [misspelt(random, old)]
    elif isinstance(old, int | float):
        close = [-old, old * 1000, old / 1000, old + 1, old - 1, old // 2]
    elif isinstance(old, list):
        close = [old * 2, old[:1], {"0": old}]
    elif isinstance(old, dict):
        close = [[old], list(old), {**old, "class_path": "torch.optim.SGD"}]
    alike = [value for value in VALUES if isinstance(value, type(old)) or isinstance(old, type(value))]
    return chosen(random, random.choice([close or alike or VALUES, alike or VALUES]))


def chosen(random: Random, values: list[Any]) -> Any:
    return deepcopy(random.choice(values))


# Python hides these warnings from users. All others would be shown, and fail a test.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Hang(BaseException):
    """A command takes too long; cl-bench must not catch this."""


@contextlib.contextmanager
def deadline() -> Iterator[None]:
    """Raise Hang after a time limit; if Python cannot even raise, print the traceback and end the tests."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise Hang(f"still running after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    assert sys.__stderr__ is not None
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the shipped configs, which the command line reads instead of them, with limited memory."""
    folder = tmp_path_factory.mktemp("checkout") / "configs"
    shutil.copytree(CONFIGS, folder)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cl_bench.run.configs.CONFIGS", folder)
        patch.setattr("cl_bench.run.configuration.CONFIGS", folder)
        patch.chdir(folder.parent)
        # Larger allocations fail, as on a machine with little memory.
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, before[1]))
        yield folder
        resource.setrlimit(resource.RLIMIT_DATA, before)


def require_success_or_one_line(words: list[str]) -> None:
    """Run a command line in this process, and check that it succeeds or prints an error of one line."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors), deadline():
        status = main(words)
    printed = errors.getvalue()
    if status == 0:
        assert not printed
        return
    lines = printed.splitlines()
    assert "Traceback" not in printed
    if status == 1:
        assert lines.pop().startswith("The traceback is in ")
    assert status in (1, 2)
    assert len(lines) == 1 and len(lines[0].removeprefix("error: ")) > 12, printed


def check(mutant: Mutant, configs: Path) -> None:
    """Replace a config with its mutant, and run the commands that read it."""
    file = configs / mutant.file
    shipped = file.read_text(encoding="utf-8")
    file.write_text(mutant.text, encoding="utf-8")
    try:
        if mutant.kind == "grids":
            require_success_or_one_line(["grid", mutant.stem, "--dry-run", "--results=results"])
        elif mutant.kind == "recipes":
            require_success_or_one_line(
                ["run", mutant.stem, mutant.dataset, "--root=nowhere", "--print_protocol"]
            )
            # The data of the recipe are not here, but those of toy are, and a recipe works with any dataset.
            recipe = configs / "recipes" / "toy" / file.name
            recipe.parent.mkdir(exist_ok=True)
            recipe.write_text(mutant.text, encoding="utf-8")
            run(mutant, [mutant.stem, "toy", *DEEP])
            recipe.unlink()
        else:
            pairs = {"strategies": [mutant.stem, "toy"], "datamodules": ["lora", mutant.stem]}
            run(mutant, pairs.get(mutant.kind, ["lora", "toy"]))
    finally:
        file.write_text(shipped, encoding="utf-8")


def run(mutant: Mutant, pair: list[str]) -> None:
    """Parse and build, and if the mutant is to be trained, train one batch of every experience."""
    require_success_or_one_line(["run", *pair, "--print_protocol"])
    if mutant.trained:
        require_success_or_one_line(["run", *pair, *ONE_BATCH])
        shutil.rmtree("results", ignore_errors=True)


def fuzz(seeds: range, configs: Path) -> int:
    """Check a mutant for every seed and return how many different mutants there were."""
    mutants = [mutant(Random(seed)) for seed in seeds]
    for drawn in mutants:
        check(drawn, configs)
    return len(set(mutants))


def test_a_mutated_config_works_or_is_refused_in_one_line(configs: Path) -> None:
    assert fuzz(range(12), configs) > 10


@pytest.mark.soak
def test_each_of_a_thousand_mutated_configs_works_or_is_refused_in_one_line(configs: Path) -> None:
    assert fuzz(range(1500), configs) > 1000
