"""The options of ``cl-bench run``. Torch and Lightning are imported only when the command runs."""

from __future__ import annotations

import sys
import traceback
from contextlib import nullcontext
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cl_bench.processes.launcher import launched, rank, with_launcher
from cl_bench.run.configs import stems_of

if TYPE_CHECKING:
    from cl_bench.run.configuration import Configuration

_FLAGS = ("-v", "-h", "--help", "--print_config", "--print_protocol")
_USAGE = "cl-bench run STRATEGY DATASET [--seed 1] [--order numpy:1993] [--KEY VALUE ...]"


def run(words: list[str]) -> int:
    """Run the cell that ``words`` describe, or print its help, config or protocol.

    Return the exit status: 0 if the cell is done, 1 if it failed.

    Raises:
        ValueError: If the words are not valid, or another process runs the cell.
        OSError: If data or weights are missing.
    """
    names = list(takewhile(lambda word: not word.startswith("-"), words))
    flags = {word for word in words if word in _FLAGS}
    overrides = [word for word in words[len(names) :] if word not in flags]
    wants_help, verbose = bool(flags & {"-h", "--help"}), "-v" in flags
    if not names and wants_help:
        return _print_help()
    is_file = len(names) == 1 and names[0].endswith((".yaml", ".yml"))
    if not is_file and len(names) != 2:
        raise ValueError(f"Name one strategy and one dataset, or one config file: {_USAGE}")

    from cl_bench.run.configuration import layers, resolve

    configuration = resolve([Path(names[0])] if is_file else layers(*names), with_launcher(overrides))
    if wants_help:
        sys.stdout.write(configuration.schema.help())
        return 0
    if "--print_config" in flags:
        sys.stdout.write(configuration.yaml)
        return 0
    if "--print_protocol" in flags:
        return _print_protocol(configuration, verbose=verbose)
    return _run_cell(configuration, verbose=verbose)


def _print_help() -> int:
    _console().print(
        f"usage: {_USAGE}\n"
        "       cl-bench run CONFIG.yaml [--KEY VALUE ...]\n\n"
        f"  STRATEGY          {', '.join(stems_of('strategies'))}, or the path of a config\n"
        f"  DATASET           {', '.join(stems_of('datamodules'))}, or the path of a config\n"
        "  --KEY VALUE       any argument of strategy, dataset, backbone or trainer, such as\n"
        "                    --rank 4, --num_experiences 5, --trainer.max_epochs 3\n"
        "  --print_config    print the resolved config and stop; run from a file, it is the same cell\n"
        "  --print_protocol  print in words what comparable results must have in common, and stop\n"
        "  -v                print the resolved config, the libraries' notices and tracebacks\n\n"
        "cl-bench run STRATEGY DATASET --help lists the arguments of that pair.",
        markup=False,
    )
    return 0


def _print_protocol(configuration: Configuration, *, verbose: bool) -> int:
    from cl_bench.run.protocol import in_words
    from cl_bench.run.run import quiet

    with nullcontext() if verbose else quiet():
        words = in_words(configuration)
    _console().print(words, markup=False)
    return 0


def _run_cell(configuration: Configuration, *, verbose: bool) -> int:
    from cl_bench.run.claim import Held
    from cl_bench.run.console import RunConsole, closing_lines, opening_lines
    from cl_bench.run.run import RunFailed, finished, images_now, quiet, require_same_images, run
    from cl_bench.run.tracking import how_to_read

    console = _console() if rank() == 0 or configuration.is_single else Console(quiet=True)
    done = finished(configuration)
    if done is not None:
        require_same_images(done, configuration, images_now(configuration))
        console.print(f"This cell is already done: {done}\nTo run it again, remove its folder.", markup=False)
        return 0
    if verbose:
        console.print(configuration.yaml, markup=False)
    console.print(opening_lines(configuration), markup=False)

    def waiting(sentence: str) -> None:
        console.print(f"{sentence} Waiting for its result.", markup=False)

    # Under a launcher only the first process would wait for the cell, while the others wait for the first.
    wait = waiting if launched() == 1 else None
    try:
        with nullcontext() if verbose else quiet():
            result = run(configuration, [RunConsole(console)], wait=wait)
    except Held as error:
        raise ValueError(f"{error} Run this command again when that process has ended.") from error
    except RunFailed as error:
        if verbose:
            traceback.print_exception(error)
        if str(error):
            _console(stderr=True).print(
                f"error: {error}\nThe traceback is in {configuration.folder}/error.txt", markup=False
            )
        return 1
    lines = [closing_lines(result, configuration.folder), *how_to_read([configuration])]
    console.print("\n".join(lines), markup=False)
    return 0


def _console(*, stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False, emoji=False, soft_wrap=True)
