"""The options of ``cl-bench prepare``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb to ``parser``."""
    parser.add_argument("dataset", metavar="DATASET", help="cifar100, imagenet_r, imagenet100 or domainnet")
    parser.add_argument("--root", type=Path, required=True, help="folder to fill")
    parser.add_argument("--offline", action="store_true", help="use only files in the root, no network")
    parser.add_argument(
        "--source", type=Path, default=None, help="imagenet100: folder of ImageNet-1k (default: the root)"
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        choices=("first100", "numpy1993", "cmc"),
        default=("first100", "numpy1993", "cmc"),
        help="imagenet100: the class lists to build (default: all)",
    )
    parser.add_argument("-v", action="store_true", help="show tracebacks")


def run(options: argparse.Namespace) -> int:
    """Prepare a dataset and return the exit status.

    Raises:
        ValueError: If the dataset is unknown, or a file is not the published one.
        OSError: If something is missing, cannot be fetched, or does not fit on the disk.
    """
    from rich.console import Console

    from cl_bench.prepare.command import prepare

    prepare(
        options.dataset,
        options.root,
        Console(highlight=False, emoji=False, soft_wrap=True),
        offline=options.offline,
        source=options.source,
        classes=options.classes,
    )
    return 0
