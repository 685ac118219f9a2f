"""The options of ``cl-bench tune``. Torch, Lightning and Optuna are imported only when they are run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cl_bench.grid.options import add_engine, engine_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb to ``parser``."""
    parser.epilog = "Any other --KEY=VALUE goes to every trial, such as --root=FOLDER."
    parser.add_argument("strategy", metavar="STRATEGY", help="config stem or path of a strategy")
    parser.add_argument("dataset", metavar="DATASET", help="config stem or path of a dataset")
    parser.add_argument("--space", help="stem or path of a space (default: that of the strategy)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--trials", type=int, help="budget in trials (default: 12)")
    budget.add_argument("--epochs", type=int, help="budget in epochs, those of all trials together")
    budget.add_argument("--seconds", type=float, help="budget in seconds, those of all trials together")
    parser.add_argument(
        "--on",
        default="first:3",
        help="first:K, the first experiences, or all, which looks into the future (default: first:3)",
    )
    parser.add_argument("--metric", default="maa/sample", help="the score (default: maa/sample)")
    parser.add_argument(
        "--val_fraction", type=float, default=0.2, help="share of training images to score on (default: 0.2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampler and trials (default: 0)")
    parser.add_argument("--order", default="identity", help="class order of the trials (default: identity)")
    parser.add_argument(
        "--sensitivity", action="store_true", help="also try the best with 0.3 and 3 times its learning rate"
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of all results")
    add_engine(parser)
    parser.add_argument("-v", action="store_true", help="show tracebacks")


def run(options: argparse.Namespace, settings: Sequence[str]) -> int:
    """Tune a strategy; return 0 if the study is over, 1 if a trial failed.

    Args:
        options: The options of the verb.
        settings: Further words of every trial, each ``--KEY=VALUE``.

    Raises:
        ValueError: If a word is not a setting, or the study cannot be done.
    """
    for word in settings:
        if not word.startswith("--") or "=" not in word:
            raise ValueError(f"{word!r} is not a setting: write --KEY=VALUE, with the equals sign.")

    from rich.console import Console

    from cl_bench.results.files import file_name
    from cl_bench.tune.command import tune
    from cl_bench.tune.space import read_space
    from cl_bench.tune.study import UNITS, Plan

    given = {unit: getattr(options, unit) for unit in UNITS}
    unit = next((unit for unit in UNITS if given[unit] is not None), "trials")
    stems = (Path(name).stem for name in (options.strategy, options.dataset))
    plan = Plan(
        strategy=options.strategy,
        dataset=options.dataset,
        space=read_space(options.space or Path(options.strategy).stem),
        unit=unit,
        budget=12 if given[unit] is None else given[unit],
        on=options.on,
        metric=_metric(options.metric),
        results=options.results,
        fixed=tuple(settings),
        val_fraction=options.val_fraction,
        seed=options.seed,
        order=options.order,
        sensitivity=options.sensitivity,
        name=file_name("-".join(stems)),
    )
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    return 0 if tune([plan], engine_of(options), console) else 1


def _metric(name: str) -> str:
    """Return the full name of a metric, of which MAA and ACC count every image once."""
    return f"{name.lower()}/sample" if name.upper() in ("MAA", "ACC") else name
