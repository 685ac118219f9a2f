"""The options of ``cl-bench predictions``. The rest is imported only when the command runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb to ``parser``."""
    parser.add_argument(
        "cells",
        type=Path,
        nargs="+",
        metavar="CELL",
        help="folders of cells that were run with --keep predictions",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for CSV files: accuracy of every class and domain over time, confusion of classes",
    )
    parser.add_argument("-v", action="store_true", help="show tracebacks")


def run(options: argparse.Namespace) -> int:
    """Print the numbers of every cell, and paired tests of several; return 0.

    Raises:
        FileNotFoundError: If a cell has kept no predictions.
        ValueError: If they are not those of its result.
    """
    from rich.console import Console

    from cl_bench.errors import visible
    from cl_bench.predictions.command import described

    text, files = described(options.cells, options.output)
    Console(highlight=False, emoji=False, soft_wrap=True).print(text, markup=False)
    notices = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    for path in files:
        notices.print(f"wrote {visible(str(path))}", markup=False)
    return 0
