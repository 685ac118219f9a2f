"""The verbs of the command line, from run to bench. Each imports what it needs by itself."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cl_bench.errors import sentence
from cl_bench.processes.launcher import launched, rank, with_launcher

if TYPE_CHECKING:
    from cl_bench.grid.engine import Engine
    from cl_bench.run.configuration import Configuration

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
_FIRST_SPEAKS = 3.0  # seconds
_CHECK_USAGE = "cl-bench check STRATEGY [--KEY VALUE ...]"
_RUN_FLAGS = ("-v", "-h", "--help", "--print_config", "--print_protocol")
_RUN_USAGE = "cl-bench run STRATEGY DATASET [--seed 1] [--order numpy:1993] [--KEY VALUE ...]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    It is 0 when all is done, 1 when a cell failed, 2 when the command cannot be used, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["run"]:
            return _run(words[1:])
        if launched() > 1:
            raise ValueError("Several processes share a run alone: call this verb without a launcher.")
        if words[:1] == ["check"]:
            return _check(words[1:])
        if words[:1] == ["reproduce"]:
            return _reproduce(*_parser().parse_known_args(words))
        options = _parser().parse_args(words)
        verbs = {"grid": _grid, "report": _report, "prepare": _prepare, "bench": _bench}
        return verbs[options.verb](options)
    except (ValueError, OSError) as error:
        if "-v" in words:
            traceback.print_exception(error)
        if launched() > 1 and rank():
            time.sleep(_FIRST_SPEAKS)  # all refuse alike; a launcher ends all when the first of them is gone
        else:
            _console(stderr=True).print(f"error: {sentence(error)}", markup=False)
        return REFUSED
    except KeyboardInterrupt:
        if rank() == 0:
            _console(stderr=True).print("Interrupted. The same command goes on where this one stopped.")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cl-bench",
        description="Continual learning with low-rank adapters, measured so that the numbers can be trusted.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    verbs.add_parser("run", help="train and evaluate one strategy on one dataset", usage=_RUN_USAGE)
    verbs.add_parser("check", help="hold a strategy to its contract, in seconds", usage=_CHECK_USAGE)
    grid = verbs.add_parser("grid", help="run every cell of a grid; finished cells are skipped")
    grid.add_argument("grid", type=str, metavar="GRID", help="config stem or path of a grid")
    _add_engine(grid)
    grid.add_argument(
        "--results", type=Path, default=None, help="folder of all results (default: the grid's)"
    )
    grid.add_argument(
        "--dry-run", action="store_true", help="list the cells and what became of them; run nothing"
    )
    grid.add_argument("-v", action="store_true", help="show tracebacks")
    report = verbs.add_parser("report", help="tables and pictures of a results folder")
    report.add_argument("results", type=Path, metavar="RESULTS", help="folder with results")
    report.add_argument(
        "--format",
        choices=("md", "latex", "csv", "json", "html"),
        default="md",
        help="of the table (default: md)",
    )
    report.add_argument(
        "--metrics", nargs="+", default=None, metavar="NAME", help="such as acc/sample bwt/gem"
    )
    report.add_argument(
        "--wandb",
        default=None,
        metavar="PROJECT",
        help="also rebuild the runs on Weights & Biases, with a view for each benchmark; offline, write both",
    )
    report.add_argument("-v", action="store_true", help="show tracebacks")
    _add_reproduce(verbs)
    _add_prepare(verbs.add_parser("prepare", help="fetch, check and scan a dataset"))
    _add_bench(verbs.add_parser("bench", help="measure training steps beside a hand-written loop"))
    return parser


def _add_reproduce(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "reproduce",
        help="put our cells beside a published number, running those that are not done",
        epilog="Any other --KEY=VALUE goes to every cell, such as --root=FOLDER.",
    )
    verb.add_argument("strategy", metavar="STRATEGY", help="config stem of a strategy, such as janus_lora")
    verb.add_argument("dataset", metavar="DATASET", help="config stem of a dataset, such as imagenet_r")
    verb.add_argument("--num_experiences", type=int, default=None, help="length of the stream, as published")
    verb.add_argument("--against", default="inflora", help="strategy of the contrast (default: inflora)")
    verb.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="(default: 1 to 5)")
    verb.add_argument("--orders", nargs="+", default=["identity"], help="class orders (default: identity)")
    verb.add_argument("--results", type=Path, default=Path("results/reproduce"), help="folder of all results")
    _add_engine(verb)
    verb.add_argument("--dry-run", action="store_true", help="run nothing; compare what there is")
    verb.add_argument("-v", action="store_true", help="show tracebacks")


def _add_engine(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--engine",
        choices=("local", "ray", "slurm"),
        default="local",
        help="where cells run: processes of this machine, a Ray cluster, SLURM (default: local)",
    )
    verb.add_argument(
        "--workers", type=int, default=None, help="cells at a time (default: as many as there is room for)"
    )
    verb.add_argument(
        "--address",
        metavar="HOST:PORT",
        default=None,
        help="ray: of the cluster; auto is the one that this machine is part of (default: auto)",
    )
    verb.add_argument(
        "--gpus-per-cell", type=float, default=None, help="ray, slurm: GPUs of a cell; on Ray also 0.5"
    )
    verb.add_argument(
        "--slurm",
        nargs="+",
        metavar="KEY=VALUE",
        default=None,
        help="slurm: what sbatch is given, such as partition=gpu time=240, in minutes (default: a day)",
    )


def _engine(options: argparse.Namespace) -> Callable[[Path], Engine]:
    """Return what makes the engine that the options name, once the results folder is known."""
    from cl_bench.grid.engine import engine

    slurm = None if options.slurm is None else dict(map(_parameter, options.slurm))

    def chosen(results: Path) -> Engine:
        return engine(
            options.engine,
            results,
            workers=options.workers,
            address=options.address,
            gpus_per_cell=options.gpus_per_cell,
            slurm=slurm,
        )

    return chosen


def _parameter(word: str) -> tuple[str, str | int]:
    name, equals, value = word.partition("=")
    if not (name and equals and value):
        raise ValueError(f"{word!r} is no parameter of sbatch: write KEY=VALUE, such as partition=gpu.")
    return name, int(value) if value.isdecimal() else value


def _add_prepare(prepare: argparse.ArgumentParser) -> None:
    prepare.add_argument("dataset", metavar="DATASET", help="cifar100, imagenet_r, imagenet100 or domainnet")
    prepare.add_argument("--root", type=Path, required=True, help="folder to fill")
    prepare.add_argument("--offline", action="store_true", help="touch no network: use the files in the root")
    prepare.add_argument(
        "--source", type=Path, default=None, help="imagenet100: where ImageNet-1k is (default: the root)"
    )
    prepare.add_argument(
        "--classes",
        nargs="+",
        choices=("first100", "numpy1993", "cmc"),
        default=("first100", "numpy1993", "cmc"),
        help="imagenet100: the class lists to build (default: all)",
    )
    prepare.add_argument("-v", action="store_true", help="show tracebacks")


def _add_bench(bench: argparse.ArgumentParser) -> None:
    # What is not given is left to cl_bench.bench.command.Wanted, which costs the import of torch.
    def add(*names: str, dest: str, **how: Any) -> None:
        bench.add_argument(*names, dest=dest, default=argparse.SUPPRESS, **how)

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
    bench.add_argument("--threads", type=int, default=None, help="CPU threads (default: as PyTorch chooses)")
    bench.add_argument("--json", action="store_true", help="print JSON; the table goes to standard error")
    bench.add_argument("-v", action="store_true", help="show tracebacks")


def _console(*, stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def _run(words: list[str]) -> int:
    names = list(takewhile(lambda word: not word.startswith("-"), words))
    flags = {word for word in words if word in _RUN_FLAGS}
    overrides = [word for word in words[len(names) :] if word not in flags]
    wants_help = bool(flags & {"-h", "--help"})
    if not names and wants_help:
        return _run_help()
    is_file = len(names) == 1 and names[0].endswith((".yaml", ".yml"))
    if not is_file and len(names) != 2:
        raise ValueError(f"Name one strategy and one dataset, or one config file: {_RUN_USAGE}")

    from cl_bench.run.configuration import layers, resolve

    configuration = resolve([Path(names[0])] if is_file else layers(*names), with_launcher(overrides))
    if wants_help:
        sys.stdout.write(configuration.schema.help())
        return DONE
    if "--print_config" in flags:
        sys.stdout.write(configuration.yaml)
        return DONE
    if "--print_protocol" in flags:
        return _print_protocol(configuration, verbose="-v" in flags)
    return _run_cell(configuration, verbose="-v" in flags)


def _run_help() -> int:
    from cl_bench.run.configuration import stems_of

    _console().print(
        f"usage: {_RUN_USAGE}\n"
        "       cl-bench run CONFIG.yaml [--KEY VALUE ...]\n\n"
        f"  STRATEGY        {', '.join(stems_of('strategies'))}, or the path of a config\n"
        f"  DATASET         {', '.join(stems_of('datamodules'))}, or the path of a config\n"
        "  --KEY VALUE     any argument of the strategy, the dataset, the backbone or the trainer, such as\n"
        "                  --rank 4, --num_experiences 5, --trainer.max_epochs 3\n"
        "  --print_config  print the resolved config and stop; saved and run alone, it is the same cell\n"
        "  --print_protocol\n"
        "                  say in words what must be equal for results to stand side by side, and stop\n"
        "  -v              print the resolved config, the libraries' notices and tracebacks\n\n"
        "cl-bench run STRATEGY DATASET --help lists the arguments of that pair.",
        markup=False,
    )
    return DONE


def _print_protocol(configuration: Configuration, *, verbose: bool) -> int:
    from contextlib import nullcontext

    from cl_bench.run.protocol import in_words
    from cl_bench.run.run import quiet

    with nullcontext() if verbose else quiet():
        words = in_words(configuration)
    _console().print(words, markup=False)
    return DONE


def _run_cell(configuration: Configuration, *, verbose: bool) -> int:
    from contextlib import nullcontext

    from cl_bench.run.claim import Held
    from cl_bench.run.console import RunConsole, closing_lines, opening_lines
    from cl_bench.run.run import RunFailed, finished, quiet, run

    console = _console() if rank() == 0 else Console(quiet=True)
    done = finished(configuration)
    if done is not None:
        console.print(
            f"This cell is already done: {done}\nNothing to do. To run it again, remove its folder.",
            markup=False,
        )
        return DONE
    if verbose:
        console.print(configuration.yaml, markup=False)
    console.print(opening_lines(configuration), markup=False)

    def waiting(sentence: str) -> None:
        console.print(f"{sentence} Waiting for its result.", markup=False)

    # Of the processes of a launcher only the first would wait, and the others would wait for it.
    waits = launched() == 1
    try:
        with nullcontext() if verbose else quiet():
            result = run(configuration, [RunConsole(console)], wait=waiting if waits else None)
    except Held as error:
        _console(stderr=True).print(
            f"error: {error} Start this command again when it has ended.", markup=False
        )
        return REFUSED
    except RunFailed as error:
        if verbose:
            traceback.print_exception(error)
        if str(error):
            _console(stderr=True).print(
                f"error: {error}\nThe traceback is in {configuration.folder}/error.txt", markup=False
            )
        return FAILED
    console.print(closing_lines(result, configuration.folder), markup=False)
    return DONE


def _check(words: list[str]) -> int:
    names = list(takewhile(lambda word: not word.startswith("-"), words))
    if "-h" in words or "--help" in words:
        return _check_help()
    if len(names) != 1:
        raise ValueError(f"Name one strategy: {_CHECK_USAGE}")
    overrides = [word for word in words[1:] if word != "-v"]
    from cl_bench.check.command import check

    return DONE if check(names[0], overrides, _console()) else FAILED


def _check_help() -> int:
    from cl_bench.run.configuration import stems_of

    _console().print(
        f"usage: {_CHECK_USAGE}\n\n"
        "Run a strategy on a tiny transformer and stream, and print a line for each claim of its contract.\n"
        "The exit status is 0 if all hold, 1 if one fails.\n\n"
        f"  STRATEGY        {', '.join(stems_of('strategies'))}; the path of a config; a class path,\n"
        "                  such as strategies.lora.LoRA; or a file, FILE.py or FILE.py:MyMethod\n"
        "  --KEY VALUE     any argument of the strategy, such as --variant shared",
        markup=False,
    )
    return DONE


def _grid(options: argparse.Namespace) -> int:
    from cl_bench.grid.command import run_grid

    done = run_grid(options.grid, options.results, _engine(options), dry_run=options.dry_run)
    return DONE if done else FAILED


def _reproduce(options: argparse.Namespace, overrides: list[str]) -> int:
    for word in overrides:
        if not word.startswith("--") or "=" not in word:
            raise ValueError(f"{word!r} is no setting: write --KEY=VALUE, with the equals sign.")

    from cl_bench.reproduce.command import Wanted, reproduce

    wanted = Wanted(
        strategy=options.strategy,
        dataset=options.dataset,
        num_experiences=options.num_experiences,
        against=None if options.against == options.strategy else options.against,
        seeds=options.seeds,
        orders=options.orders,
        results=options.results,
        overrides=overrides,
    )
    return DONE if reproduce(wanted, _engine(options), dry_run=options.dry_run) else FAILED


def _prepare(options: argparse.Namespace) -> int:
    from cl_bench.prepare.command import prepare

    prepare(
        options.dataset,
        options.root,
        _console(),
        offline=options.offline,
        source=options.source,
        classes=options.classes,
    )
    return DONE


def _bench(options: argparse.Namespace) -> int:
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
    beside = _console(stderr=True)
    given = vars(options).keys() & {field.name for field in fields(Wanted)}
    found = bench(Wanted(**{name: getattr(options, name) for name in given}), beside.print)
    (beside if options.json else _console()).print(found.text(), markup=False)
    if options.json:
        sys.stdout.write(found.json() + "\n")
    return DONE


def _report(options: argparse.Namespace) -> int:
    from cl_bench.report import report

    written = report(options.results, options.format, options.metrics)
    _console().print(written.text, markup=False)
    notices = _console(stderr=True)  # so that a table can be sent on, and nothing but it
    notices.print("\n".join(f"wrote {path}" for path in written.files), markup=False)
    if options.wandb is not None:
        from cl_bench.report import FOLDER, METRICS, results_below
        from cl_bench.report.upload import upload

        results, _ = results_below(options.results)
        shown = options.metrics or METRICS
        notices.print(upload(results, options.wandb, options.results / FOLDER, shown).text, markup=False)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
