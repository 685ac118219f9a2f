"""The options of ``cl-bench report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to ``parser``."""
    parser.add_argument("results", type=Path, metavar="RESULTS", help="folder with results")
    parser.add_argument(
        "--format",
        choices=("md", "latex", "csv", "json", "html"),
        default="md",
        help="of the table (default: md)",
    )
    parser.add_argument(
        "--metrics", nargs="+", default=None, metavar="NAME", help="such as acc/sample bwt/gem"
    )
    parser.add_argument(
        "--wandb",
        default=None,
        metavar="PROJECT",
        help="also rebuild the runs on Weights & Biases, with a view for each benchmark; offline, write both",
    )
    parser.add_argument("-v", action="store_true", help="show tracebacks")


def run(options: argparse.Namespace) -> int:
    """Write the report, print its table, and return the exit status."""
    from cl_bench.report import report

    written = report(options.results, options.format, options.metrics)
    Console(highlight=False, soft_wrap=True).print(written.text, markup=False)
    notices = Console(stderr=True, highlight=False, soft_wrap=True)  # standard output holds only the table
    notices.print("\n".join(f"wrote {path}" for path in written.files), markup=False)
    if options.wandb is not None:
        from cl_bench.report import FOLDER, METRICS, results_below
        from cl_bench.report.upload import upload

        results, _ = results_below(options.results)
        shown = options.metrics or METRICS
        notices.print(upload(results, options.wandb, options.results / FOLDER, shown).text, markup=False)
    return 0
