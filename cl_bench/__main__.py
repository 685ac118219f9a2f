"""The command line: one verb for each room that has a file ``options``, imported only for the verb in use."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from rich.console import Console

from cl_bench.errors import sentence
from cl_bench.processes.launcher import launched, rank
from cl_bench.processes.streams import unfailing_output

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130

_VERBS = {
    "run": "train and evaluate one strategy on one dataset",
    "check": "check in seconds that a strategy keeps its contract",
    "grid": "run every cell of a grid; finished cells are skipped",
    "tune": "choose settings on held-out training images, within a budget",
    "report": "make tables and pictures from a results folder",
    "predictions": "print confusion, recency bias, calibration and paired tests of kept predictions",
    "export": "write the kept model of a cell for timm and PEFT",
    "reproduce": "compare our cells with a published number, and run those that are missing",
    "prepare": "download, verify and scan a dataset",
    "bench": "compare the speed of training steps with a hand-written loop",
    "survey": "check and measure every strategy on a GPU, in one call of nine minutes",
}
_SECONDS_FOR_THE_FIRST = 3.0

# What these print is all that they do.
_PRINTING_VERBS = ("bench", "predictions", "report")
_PRINTING_FLAGS = ("-h", "--help", "--print_config", "--print_protocol", "--dry-run")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    It is 0 when all is done, 1 when a cell failed, 2 when the command cannot be used, 130 after Ctrl-C. A
    path may begin with ``~``. Output that cannot be written changes neither the work nor the status, unless
    output is all that was asked for and a full disk lost it.
    """
    _spare_the_home_folder()
    words = [_at_home(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    with unfailing_output() as (output, _):
        status = _status(words)
        output.flush()
        lost = output.error
        if isinstance(lost, OSError) and not isinstance(lost, BrokenPipeError):
            sys.stderr.write(f"error: The output could not be written ({lost.strerror}).\n")
            printing = {*words[:1]} & {*_PRINTING_VERBS} or {*words} & {*_PRINTING_FLAGS}
            status = REFUSED if printing and status == DONE else status
    return status


def _spare_the_home_folder() -> None:
    """Let matplotlib, which libraries import, keep its caches elsewhere unless it has a folder already."""
    if "MPLCONFIGDIR" in os.environ:
        return
    for variable, folder in (("XDG_CONFIG_HOME", "~/.config"), ("XDG_CACHE_HOME", "~/.cache")):
        place = os.path.join(os.environ.get(variable) or os.path.expanduser(folder), "matplotlib")
        if not os.access(place, os.W_OK):
            temporary = tempfile.TemporaryDirectory(prefix="cl-bench-matplotlib-")
            atexit.register(temporary.cleanup)
            os.environ["MPLCONFIGDIR"] = temporary.name
            return


def _at_home(word: str) -> str:
    """Return a word with the path of the home folder in place of ``~``, as in ``--results=~/mine``."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + os.path.expanduser(value)


def _status(words: Sequence[str]) -> int:
    """Call the verb, print its error if there is one, and return the exit status."""
    console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    try:
        return _called(words)
    except (ValueError, OSError) as error:
        if "-v" in words:
            traceback.print_exception(error)
        if launched() > 1 and rank():
            # Every process fails with this error, and the launcher kills the others when one of them exits.
            time.sleep(_SECONDS_FOR_THE_FIRST)
        else:
            console.print(f"error: {sentence(error)}", markup=False)
        return REFUSED
    except KeyboardInterrupt:
        if rank() == 0:
            console.print("Interrupted. Run the same command again to resume.")
        return INTERRUPTED


def _called(words: Sequence[str]) -> int:
    """Call the verb that ``words`` begin with, and return its exit status."""
    verb, *rest = words or [""]
    if launched() > 1 and verb != "run":
        raise ValueError("Only cl-bench run works in several processes: call this verb without a launcher.")
    if verb not in _VERBS:
        _overview().parse_args(words)  # exits, after the help or an error
    options: Any = import_module(f"cl_bench.{verb}.options")
    if verb in ("run", "check"):  # jsonargparse reads the keys of their classes
        return int(options.run(rest))
    parser = argparse.ArgumentParser(prog=f"cl-bench {verb}", description=f"{_VERBS[verb].capitalize()}.")
    options.add_arguments(parser)
    if verb in ("reproduce", "tune"):  # pass the keys of their cells on
        return int(options.run(*parser.parse_known_args(rest)))
    if verb == "grid":  # may tune its strategies first, and tuning runs on the engines of grids
        return int(options.run(parser.parse_args(rest), import_module("cl_bench.tune.grids").tuned))
    return int(options.run(parser.parse_args(rest)))


def _overview() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cl-bench",
        description="Continual learning with low-rank adapters, measured so that the numbers can be trusted.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, purpose in _VERBS.items():
        verbs.add_parser(verb, help=purpose)
    return parser


if __name__ == "__main__":
    sys.exit(main())
