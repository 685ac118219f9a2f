"""The options of ``cl-bench report``. What makes the report is imported only when the options are run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cl_bench.report.pictures.figures import Style


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb to ``parser``."""
    parser.add_argument("results", type=Path, metavar="RESULTS", help="folder with results, at any depth")
    parser.add_argument(
        "--format",
        choices=("md", "latex", "csv", "json", "html"),
        default="md",
        help="format of the tables; html is one page with charts (default: md)",
    )
    parser.add_argument(
        "--metrics", nargs="+", metavar="NAME", help="metrics shown, such as acc/sample bwt/gem"
    )
    parser.add_argument(
        "--published",
        nargs=3,
        metavar=("SOURCE", "DATASET", "T"),
        help="also print the rank correlation with a published table, such as janus_lora imagenet_r 10",
    )
    parser.add_argument(
        "--figure-width",
        metavar="INCHES",
        help="width of the pictures of md and latex: column (3.25 inches), page (6.75), or inches "
        "(default: page)",
    )
    parser.add_argument(
        "--font-size", type=float, metavar="POINTS", help="size of the text in these pictures (default: 8)"
    )
    parser.add_argument(
        "--wandb",
        metavar="PROJECT",
        help="also send runs and a view of each benchmark to Weights & Biases, or offline write them to disk",
    )
    parser.add_argument("-v", action="store_true", help="show tracebacks")


def run(options: argparse.Namespace) -> int:
    """Write the report and return 0; its tables go to standard output, paths and notices to standard error.

    Raises:
        FileNotFoundError: If there is no such folder, or no result in it.
        ValueError: If a metric has no definition, pictures cannot have that size, or the W&B project or its
            package is not usable.
    """
    from rich.console import Console

    from cl_bench.errors import visible
    from cl_bench.report.command import FOLDER, METRICS, report, results_below

    published = None
    if options.published is not None:
        source, dataset, length = options.published
        if not length.isdecimal():
            raise ValueError(f"T of --published cannot be {length!r}: give a number of experiences.")
        published = (source, dataset, int(length))
    written = report(options.results, options.format, options.metrics, _style(options), published)
    Console(highlight=False, emoji=False, soft_wrap=True).print(written.text, markup=False)
    notices = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    for line in (*written.notices, *(f"wrote {visible(str(path))}" for path in written.files)):
        notices.print(line, markup=False)
    if options.wandb is not None:
        from cl_bench.report.upload import upload

        results, _ = results_below(options.results)
        shown = options.metrics or METRICS
        page = report(options.results, "html", options.metrics)
        files = [*dict.fromkeys((*written.files, *page.files))]
        sent = upload(results, options.wandb, options.results / FOLDER, shown, files)
        notices.print(sent.text, markup=False)
    return 0


def _style(options: argparse.Namespace) -> Style:
    """Return the style of the pictures that ``options`` describe."""
    from cl_bench.report.pictures.figures import DEFAULT, WIDTHS, Style

    given = {"--figure-width": options.figure_width, "--font-size": options.font_size}
    if options.format not in ("md", "latex"):
        for option, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{option} has no effect with --format {options.format}, which writes no pictures: "
                    "choose md or latex."
                )
    width = options.figure_width or "page"
    try:
        inches = WIDTHS[width] if width in WIDTHS else float(width)
    except ValueError as error:
        raise ValueError(
            f"--figure-width cannot be {width!r}: write column, page, or a number of inches such as 5.5."
        ) from error
    return Style(inches, DEFAULT.font if options.font_size is None else options.font_size)
