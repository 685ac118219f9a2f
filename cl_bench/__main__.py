"""The command line: one verb for each room that has a file ``options``, imported only for the verb in use."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from rich.console import Console

from cl_bench.errors import sentence
from cl_bench.processes.launcher import launched, rank

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130

_VERBS = {
    "run": "train and evaluate one strategy on one dataset",
    "check": "check in seconds that a strategy keeps its contract",
    "grid": "run every cell of a grid; finished cells are skipped",
    "report": "make tables and pictures from a results folder",
    "reproduce": "compare our cells with a published number, and run those that are missing",
    "prepare": "download, verify and scan a dataset",
    "bench": "compare the speed of training steps with a hand-written loop",
}
_SECONDS_FOR_THE_FIRST = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    It is 0 when all is done, 1 when a cell failed, 2 when the command cannot be used, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
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
    if verb == "reproduce":  # passes the keys of its cells on
        return int(options.run(*parser.parse_known_args(rest)))
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
