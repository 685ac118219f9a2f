"""The verb ``cl-bench check``."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from rich.console import Console

from cl_bench.check.claims import verdicts
from cl_bench.check.subject import Subject
from cl_bench.contracts.strategy import Strategy
from cl_bench.errors import sentence, suggestion
from cl_bench.run.configs import Config, config_file, stems_of
from cl_bench.run.run import quiet


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
