"""The options of ``cl-bench tune``. Torch, Lightning and Optuna are imported only when the command runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cl_bench.grid.options import add_engine, engine_of, require_settings


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
    parser.add_argument("--metric", default="MAA", help="the score, such as ACC or MAA (default: MAA)")
    parser.add_argument(
        "--val_fraction", type=float, default=0.2, help="share of training images to score on (default: 0.2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampler and trials (default: 0)")
    parser.add_argument("--order", default="identity", help="class order of the trials (default: identity)")
    parser.add_argument(
        "--sensitivity", action="store_true", help="also try the best with 0.3 and 3 times its learning rate"
    )
    parser.add_argument(
        "--wandb", action="store_true", help="also log every trial to Weights & Biases, in one group"
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
    require_settings(settings)
    engine = engine_of(options)

    from rich.console import Console

    from cl_bench.tune.command import tune
    from cl_bench.tune.space import read_space
    from cl_bench.tune.study import Plan, stem

    budgets = {"trials": options.trials, "epochs": options.epochs, "seconds": options.seconds}
    given = {unit: budget for unit, budget in budgets.items() if budget is not None} or {"trials": 12}
    ((unit, budget),) = given.items()
    plan = Plan(
        strategy=options.strategy,
        dataset=options.dataset,
        space=read_space(options.space or stem(options.strategy)),
        unit=unit,
        budget=budget,
        on=options.on,
        results=options.results,
        metric=options.metric,
        fixed=tuple(settings),
        val_fraction=options.val_fraction,
        seed=options.seed,
        order=options.order,
        sensitivity=options.sensitivity,
        wandb=options.wandb,
    )
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    return 0 if tune([plan], engine, console) else 1
