"""The options of ``cl-bench reproduce``. Torch and Lightning are imported only when the options are run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cl_bench.grid.options import add_engine, engine_of, require_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb to ``parser``."""
    parser.epilog = "Any other --KEY=VALUE goes to every cell, such as --root=FOLDER."
    parser.add_argument("strategy", metavar="STRATEGY", help="config stem of a strategy, such as janus_lora")
    parser.add_argument("dataset", metavar="DATASET", help="config stem of a dataset, such as imagenet_r")
    parser.add_argument("--num_experiences", type=int, help="length of the stream, as published")
    parser.add_argument("--against", default="inflora", help="strategy of the contrast (default: inflora)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="(default: 1 to 5)")
    parser.add_argument("--orders", nargs="+", default=["identity"], help="class orders (default: identity)")
    parser.add_argument(
        "--results", type=Path, default=Path("results/reproduce"), help="folder of all results"
    )
    add_engine(parser)
    parser.add_argument("--dry-run", action="store_true", help="run nothing; compare the results that exist")
    parser.add_argument("-v", action="store_true", help="show tracebacks")


def run(options: argparse.Namespace, settings: Sequence[str]) -> int:
    """Compare our cells with a published number; return 0 if all are done, 1 otherwise.

    Args:
        options: The options of the verb.
        settings: Further words of every cell, each ``--KEY=VALUE``.

    Raises:
        ValueError: If a word is not a setting, no such number is known, or a cell is not valid.
    """
    require_settings(settings)
    engine = engine_of(options)

    from cl_bench.reproduce.command import Wanted, reproduce

    wanted = Wanted(
        strategy=options.strategy,
        dataset=options.dataset,
        num_experiences=options.num_experiences,
        against=None if options.against == options.strategy else options.against,
        seeds=options.seeds,
        orders=options.orders,
        results=options.results,
        overrides=settings,
    )
    return 0 if reproduce(wanted, engine, dry_run=options.dry_run) else 1
