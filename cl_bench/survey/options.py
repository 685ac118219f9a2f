"""The options of ``cl-bench survey``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.console import Console

from cl_bench.survey.plan import SIZES


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options to ``parser``."""
    size = "full: ViT-B/16 and 24,000 images; rehearsal: the same rows, small (default: full)"
    minutes = "stop after that time; the same command resumes (default: 9)"
    rows = "only rows whose names begin with one of these, such as tiny/lora (default: all)"
    add = parser.add_argument
    add("folder", type=Path, help="where rows.jsonl and table.md are written")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="what to survey (default: cuda)")
    add("--size", choices=SIZES, default="full", help=size)
    add("--minutes", type=float, default=9.0, help=minutes)
    add("--rows", nargs="+", default=[""], help=rows)
    add("-v", action="store_true", help="show tracebacks")


def run(options: Namespace) -> int:
    """Survey the device, print the table, and return the exit status: 1 if a row failed or is missing.

    Raises:
        ValueError: If the folder holds the rows of another survey, or there is no such device.
    """
    from cl_bench.survey.command import survey

    notices = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    found = survey(
        options.folder,
        SIZES[options.size],
        options.device,
        seconds=60 * options.minutes,
        chosen=tuple(options.rows),
        report=lambda line: notices.print(line, markup=False),
    )
    Console(highlight=False, emoji=False, soft_wrap=True).print(found.text, markup=False)
    return 0 if found.complete else 1
