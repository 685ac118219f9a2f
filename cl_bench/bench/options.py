"""The options of ``cl-bench bench``. Torch is imported only when they are run."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from typing import Any

from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to ``parser``; the defaults of most are those of ``Wanted``, which imports torch."""

    def add(*names: str, dest: str, **how: Any) -> None:
        parser.add_argument(*names, dest=dest, default=argparse.SUPPRESS, **how)

    add(
        "--strategy",
        dest="strategies",
        nargs="+",
        help="config stems (default: those with published settings)",
    )
    add(
        "--backbone",
        dest="backbone",
        help="a timm model, or small, 2.7 million parameters; its weights are random (default: ViT-B/16)",
    )
    add("--device", dest="device", help="cpu or cuda (default: cuda where there is one)")
    add("--precision", dest="precisions", nargs="+", help="32-true or bf16-mixed (default: both)")
    add("--batch", dest="batches", nargs="+", type=int, help="images (default: by the device)")
    add("--rounds", dest="rounds", type=int, help="how often each call is timed (default: 6)")
    add("--compile", dest="compiled", action="store_true", help="compile the backbone, not the floor")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: as PyTorch chooses)")
    parser.add_argument("--json", action="store_true", help="print JSON; the table goes to standard error")
    parser.add_argument("-v", action="store_true", help="show tracebacks")


def run(options: argparse.Namespace) -> int:
    """Measure, print, and return the exit status."""
    # Torch's profiler announces every measurement. The first is read when torch is imported, the second when
    # the profiler starts for the first time.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import torch

    from cl_bench.bench.command import Wanted, bench

    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"{options.threads} threads cannot measure: give --threads 1 or more.")
        torch.set_num_threads(options.threads)
    beside = Console(stderr=True, highlight=False, soft_wrap=True)
    given = vars(options).keys() & {field.name for field in fields(Wanted)}
    found = bench(Wanted(**{name: getattr(options, name) for name in given}), beside.print)
    console = beside if options.json else Console(highlight=False, soft_wrap=True)
    console.print(found.text(), markup=False)
    if options.json:
        sys.stdout.write(found.json() + "\n")
    return 0
