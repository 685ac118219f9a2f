"""The verb ``cl-bench check``, and the claims in the order in which it checks them."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType

from rich.console import Console

from cl_bench.check import cost, data, learning, reproduction, training
from cl_bench.check.leftovers import kept
from cl_bench.check.subject import Broken, Subject, Verdict
from cl_bench.contracts.strategy import Strategy
from cl_bench.errors import sentence, suggestion
from cl_bench.run.configs import Config, config_file, stems_of
from cl_bench.run.run import quiet


class Evidence:
    """The trainings that the claims examine; each runs when the first claim needs it.

    Args:
        subject: The strategy under check.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @cached_property
    def observed(self) -> training.Observed:
        """A training under a strong optimizer, observed four times in every experience."""
        return training.observed(self.subject)

    @cached_property
    def plain(self) -> reproduction.Plain:
        """A training that runs as it is configured."""
        return reproduction.plain(self.subject)

    @cached_property
    def measured(self) -> cost.Measured:
        """A training on a long stream, with the cost of every experience."""
        return cost.measured(self.subject)


CLAIMS: dict[str, Callable[[Evidence], str]] = {
    "the first experience is learnt": lambda e: learning.learning(learning.learnt(e.subject)),
    "the function is unchanged at the start of an experience": lambda e: training.start(*e.observed),
    "frozen parts stay frozen": lambda e: training.frozen(*e.observed),
    "old heads are untouched": lambda e: training.old_head(*e.observed),
    "after_training keeps the trained features": lambda e: training.after_training(*e.observed),
    "the optimizer's parameters are the strategy's own": lambda e: training.optimizer(*e.observed),
    "no task id at test time": lambda e: data.prediction(e.plain.run),
    "no data of other experiences is seen": lambda e: data.training(e.plain.seen),
    "training data are kept only as declared": lambda e: data.keeping(kept(e.subject), e.plain.seen),
    "the same seed gives the same bits": lambda e: reproduction.seed(e.plain, reproduction.plain(e.subject)),
    "a resumed run ends in the same bits": lambda e: reproduction.resume(e.subject),
    "stored state grows only as declared": lambda e: cost.state(*e.measured),
    "float32 and bfloat16 both run": lambda e: reproduction.precision(e.subject),
    "the cost of a step grows only as declared": lambda e: cost.step(*e.measured),
    "what is declared constant never changes": lambda e: training.constant(*e.observed),
}
"""What is claimed of every strategy, in words, and the check of it."""


def verdicts(subject: Subject, claims: Iterable[str] = CLAIMS) -> Iterator[Verdict]:
    """Check ``claims`` about ``subject``, one after the other."""
    evidence = Evidence(subject)
    for claim in claims:
        yield _verdict(claim, CLAIMS[claim], evidence)


def _verdict(claim: str, check: Callable[[Evidence], str], evidence: Evidence) -> Verdict:
    try:
        return Verdict(claim, passed=True, why=check(evidence))
    except Broken as broken:
        return Verdict(claim, passed=False, why=f"{broken}.")
    except Exception as error:  # a strategy may raise anything, and the other claims are still checked
        return Verdict(claim, passed=False, why=f"it stopped with: {sentence(error)}")


def check(name: str, overrides: Sequence[str], console: Console) -> bool:
    """Check the strategy ``name`` and print a line for each claim; return whether all hold.

    Args:
        name: A class path, a config stem or YAML file, or a Python file, ``FILE.py`` or ``FILE.py:Class``.
        overrides: Options of the command line, such as ``--variant shared``.
        console: Where to print.

    Raises:
        ValueError: If there is no such strategy, it cannot be built, or an override is not valid.
        FileNotFoundError: If there is no such file.
    """
    began = time.perf_counter()
    failed = 0
    with quiet():
        subject = Subject(layer(name), overrides)
        _require_buildable(subject)
        console.print(f"{subject.strategy_class.__name__} on a tiny transformer and stream", markup=False)
        for verdict in verdicts(subject):
            failed += not verdict.passed
            console.print(str(verdict), markup=False)
    outcome = f"{failed} claim{'s' * (failed > 1)} failed" if failed else "all claims hold"
    console.print(f"{outcome}, {time.perf_counter() - began:.1f} s", markup=False)
    return not failed


def _require_buildable(subject: Subject) -> None:
    try:
        subject.run()
    except Exception as error:  # a constructor may raise anything
        raise ValueError(
            f"{subject.strategy_class.__name__} cannot be built for a transformer of two blocks of width 32: "
            f"{sentence(error)}"
        ) from error


def layer(name: str) -> Path | Config:
    """Return the config of the strategy called ``name``.

    Raises:
        ValueError: If there is no such strategy.
        FileNotFoundError: If there is no such file.
    """
    file, _, class_name = name.partition(":")
    if file.endswith(".py"):
        return {"model": {"class_path": _class_path_in(Path(file), class_name)}}
    if "." in name and not name.endswith((".yaml", ".yml")):
        return {"model": {"class_path": name}}
    try:
        return config_file("strategies", name)
    except ValueError as error:
        raise ValueError(
            f"There is no strategy {name!r}. {suggestion(name, stems_of('strategies'))} You can also give a "
            "class path, such as strategies.lora.LoRA, or a file, such as my_strategy.py."
        ) from error


def _class_path_in(file: Path, class_name: str) -> str:
    """Import ``file`` and return the class path of the strategy in it."""
    module = _imported(file)
    own = [
        found.__name__
        for found in vars(module).values()
        if isinstance(found, type) and issubclass(found, Strategy) and found.__module__ == module.__name__
    ]
    if not own:
        raise ValueError(f"{file} defines no subclass of Strategy: write one, or name another file.")
    if class_name and class_name not in own:
        raise ValueError(f"There is no strategy {class_name!r} in {file}. {suggestion(class_name, own)}")
    if not class_name and len(own) != 1:
        raise ValueError(
            f"{file} defines {len(own)} subclasses of Strategy, {', '.join(own)}: name one, as {file}:Class."
        )
    return f"{module.__name__}.{class_name or own[0]}"


def _imported(file: Path) -> ModuleType:
    """Import ``file`` under its own name, and make the other modules of its folder importable."""
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module
