"""The options of ``cl-bench export``. Torch is imported only when the command runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb to ``parser``."""
    parser.add_argument(
        "cell", type=Path, metavar="CELL", help="folder of a cell that was run with --keep model"
    )
    parser.add_argument(
        "--experience", type=int, help="after which experience, counted from 1 (default: the last)"
    )
    parser.add_argument("--output", type=Path, help="folder to write (default: export in that of the cell)")
    parser.add_argument("--weights", help="file of the pre-trained weights, if it has moved")
    parser.add_argument("-v", action="store_true", help="show tracebacks")


def run(options: argparse.Namespace) -> int:
    """Export the model, print what was written, and return 0.

    Raises:
        ValueError: If timm cannot hold the model, or the files do not belong together.
        OSError: If the model or its pre-trained weights are missing.
    """
    from rich.console import Console

    from cl_bench.errors import visible
    from cl_bench.export.command import export

    index = None if options.experience is None else options.experience - 1
    written = export(options.cell, options.output, experience=index, weights=options.weights)
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    for line in (*written.notices, *(f"wrote {visible(str(path))}" for path in written.files)):
        console.print(line, markup=False)
    return 0
