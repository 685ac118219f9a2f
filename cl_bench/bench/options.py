"""The options of ``cl-bench bench``."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace

from rich.console import Console

PUBLISHED = ["lora", "inflora", "keeplora", "janus_lora", "loda"]
"""Config stems of the strategies that are measured unless others are named."""

_PRECISIONS = ["32-true", "bf16-mixed"]


# The profiler of torch logs every measurement. Torch reads the first variable when it is imported, and the
# second when the profiler starts.
SILENT = {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "99"}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options to ``parser``."""
    strategies = "config stems (default: those with published settings)"
    backbone = "a timm model, or small, 2.7 million parameters; its weights are random (default: ViT-B/16)"
    precisions = "32-true or bf16-mixed (default: both)"
    add = parser.add_argument
    add("--strategy", dest="strategies", nargs="+", default=PUBLISHED, help=strategies)
    add("--backbone", default="vit_base_patch16_224", help=backbone)
    add("--device", help="cpu or cuda (default: cuda if PyTorch sees one)")
    add("--precision", dest="precisions", nargs="+", default=_PRECISIONS, help=precisions)
    add("--batch", dest="batches", nargs="+", type=int, default=[], help="images (default: by the device)")
    add("--rounds", type=int, default=6, help="how often each call is timed (default: 6)")
    add("--compile", dest="compiled", action="store_true", help="compile the backbone, not the floor")
    add("--threads", type=int, help="CPU threads (default: as PyTorch chooses)")
    add("--json", action="store_true", help="print JSON; the table goes to standard error")
    add("-v", action="store_true", help="show tracebacks")


def run(options: Namespace) -> int:
    """Measure, print, and return the exit status.

    Raises:
        ValueError: If the options ask for what cannot be measured.
    """
    os.environ.update({**SILENT, **os.environ})
    import torch

    from cl_bench.bench.command import bench

    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"{options.threads} threads cannot measure: give --threads 1 or more.")
        torch.set_num_threads(options.threads)
    notices = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    found = bench(options, notices.print)
    table = notices if options.json else Console(highlight=False, emoji=False, soft_wrap=True)
    table.print(found.text(), markup=False)
    if options.json:
        sys.stdout.write(found.json() + "\n")
    return 0
