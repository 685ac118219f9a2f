"""The options of ``cl-bench grid``, and those that choose an engine, which ``cl-bench reproduce`` shares."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cl_bench.grid.command import Tuned
    from cl_bench.grid.engine import Engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb to ``parser``."""
    parser.add_argument("grid", type=str, metavar="GRID", help="config stem or path of a grid")
    add_engine(parser)
    parser.add_argument("--results", type=Path, help="folder of all results (default: the grid's)")
    parser.add_argument("--dry-run", action="store_true", help="list the cells with their state; run nothing")
    parser.add_argument("-v", action="store_true", help="show tracebacks")


def run(options: argparse.Namespace, tuned: Tuned) -> int:
    """Run the grid and return the exit status.

    Args:
        options: The options of the verb.
        tuned: Tunes a grid with the key ``tune``.

    Raises:
        ValueError: If the grid, one of its cells or an option is not valid. No cell has run then.
    """
    engine = engine_of(options)
    from cl_bench.grid.command import run_grid

    done = run_grid(options.grid, options.results, engine, tuned=tuned, dry_run=options.dry_run)
    return 0 if done else 1


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose an engine to ``parser``."""
    parser.add_argument(
        "--engine",
        choices=("local", "ray", "slurm"),
        default="local",
        help="where cells run: processes of this machine, a Ray cluster, SLURM (default: local)",
    )
    parser.add_argument("--workers", type=int, help="cells at a time (default: as many as fit)")
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="ray: the cluster; auto finds the one that this machine belongs to (default: auto)",
    )
    parser.add_argument("--gpus-per-cell", type=float, help="ray, slurm: GPUs of a cell; Ray also takes 0.5")
    parser.add_argument(
        "--slurm",
        nargs="+",
        metavar="KEY=VALUE",
        help="slurm: parameters of sbatch, such as partition=gpu time=240, in minutes (default: a day)",
    )


def require_settings(words: Sequence[str]) -> None:
    """Require that the words which a verb passes on to its cells are settings.

    Raises:
        ValueError: If a word is not written as ``--KEY=VALUE``.
    """
    for word in words:
        if not word.startswith("--") or "=" not in word:
            raise ValueError(f"{word!r} is not a setting: write --KEY=VALUE, with the equals sign.")


def engine_of(options: argparse.Namespace) -> Callable[[Path], Engine]:
    """Return a function from the folder of all results to the engine that ``options`` choose.

    That function raises ValueError if an option has no effect with that engine, or its extra is not
    installed. The local engine begins to import at once: call this before importing what is slow.

    Raises:
        ValueError: If a parameter of sbatch is not written as KEY=VALUE.
    """
    slurm = None if options.slurm is None else dict(map(_parameter, options.slurm))
    if options.engine == "local" and not vars(options).get("dry_run"):
        from cl_bench.grid.work import begin_imports

        begin_imports()

    def engine(results: Path) -> Engine:
        _require_effect(options)
        try:
            if options.engine == "ray":
                from cl_bench.grid.ray import RayEngine

                return RayEngine(options.address, options.workers, options.gpus_per_cell)
            if options.engine == "slurm":
                from cl_bench.grid.slurm import SlurmEngine

                return SlurmEngine(results, options.workers, options.gpus_per_cell, slurm or {})
        except ModuleNotFoundError as error:
            if error.name not in ("ray", "submitit"):
                raise
            raise ValueError(
                f"{error.name} is not installed: run pip install 'cl-bench[{options.engine}]'."
            ) from error
        from cl_bench.grid.local import LocalEngine

        return LocalEngine(options.workers)

    return engine


def _parameter(word: str) -> tuple[str, str | int]:
    name, equals, value = word.partition("=")
    if not (name and equals and value):
        raise ValueError(f"{word!r} is not a parameter of sbatch: write KEY=VALUE, such as partition=gpu.")
    return name, int(value) if value.isdecimal() else value


def _require_effect(options: argparse.Namespace) -> None:
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"A grid cannot run with {options.workers} workers: give at least one.")
    if options.gpus_per_cell is not None and not 0 <= options.gpus_per_cell:
        raise ValueError(f"A cell cannot have {options.gpus_per_cell:g} GPUs: give 0 or more, such as 0.5.")
    for option, given, engines in (
        ("--address", options.address, ("ray",)),
        ("--gpus-per-cell", options.gpus_per_cell, ("ray", "slurm")),
        ("--slurm", options.slurm, ("slurm",)),
    ):
        if given is not None and options.engine not in engines:
            raise ValueError(
                f"{option} has no effect with the engine {options.engine}: add --engine {engines[0]}."
            )
