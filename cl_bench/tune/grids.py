"""The key ``tune`` of a grid: tune every strategy with one budget, then run its cells with what was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_bench.errors import suggestion
from cl_bench.grid.cells import Cell, Grid

if TYPE_CHECKING:
    from rich.console import Console

    from cl_bench.grid.engine import Engine
    from cl_bench.tune.study import Plan

_BUDGETS = ("trials", "epochs", "seconds")
_OPTIONS = ("metric", "val_fraction", "seed", "sensitivity")
_KEYS = ("space", "experiences", "untuned", *_BUDGETS, *_OPTIONS)  # YAML reads a key "on" as true


def tuned(
    grid: Grid, engine: Callable[[Path], Engine], console: Console, *, dry_run: bool = False
) -> tuple[list[Cell], bool]:
    """Return the cells of a grid with the settings that its studies found, and whether no study failed.

    Cells whose strategy has nothing to tune stay as they are, and those whose study failed are left out. If
    ``untuned`` is true, all cells also run as they are, for a comparison.

    Args:
        grid: A grid with the key ``tune``.
        engine: Returns the engine, given the folder of all results.
        console: Where progress is printed.
        dry_run: Whether to tune nothing, and to leave out cells whose study has no record.

    Raises:
        ValueError: If the key ``tune`` is not valid, or a study cannot be done.
        FileNotFoundError: If a config or a space does not exist.
    """
    from cl_bench.tune.command import tune

    plans = {cell: plan(grid, cell) for cell in grid.cells()}
    wanted = {one.name: one for one in plans.values() if one.space.settings}
    if dry_run:
        found = {name for name, one in wanted.items() if one.is_recorded}
        console.print(f"{len(wanted)} studies, {len(found)} done", markup=False)
    else:
        found = set(tune(list(wanted.values()), engine, console)) if wanted else set()
    cells = [
        with_record(cell, one) if one.name in found else cell
        for cell, one in plans.items()
        if one.name in found or one.name not in wanted
    ]
    untuned = list(plans) if grid.tune.get("untuned") else []
    return list(dict.fromkeys([*cells, *untuned])), found == wanted.keys()


def plan(grid: Grid, cell: Cell) -> Plan:
    """Return what the study of a cell has to do; cells that differ only in seed and class order share it.

    Raises:
        ValueError: If the key ``tune`` of the grid is not valid.
        FileNotFoundError: If the space does not exist.
    """
    from cl_bench.results.files import file_name
    from cl_bench.tune.space import read_space
    from cl_bench.tune.study import Plan

    given = _checked(grid.tune)
    units = [unit for unit in _BUDGETS if unit in given]
    stem = Path(cell.strategy).stem
    rest, setting = _without_setting(cell)
    spaces: Any = given.get("space", {})
    space = spaces.get(cell.strategy, stem) if isinstance(spaces, dict) else spaces
    options = {key: given[key] for key in _OPTIONS if key in given}
    parts = [stem, *([setting] if setting else []), Path(cell.dataset).stem]
    return Plan(
        strategy=cell.strategy,
        dataset=cell.dataset,
        space=read_space(space),
        unit=units[0],
        budget=given[units[0]],
        results=Path(grid.results),
        fixed=rest,
        order=grid.orders[0],
        name=file_name("-".join(parts)),
        on=given.get("experiences", "first:3"),
        **{"metric": "maa/sample"} | options,
    )


def with_record(cell: Cell, plan: Plan) -> Cell:
    """Return ``cell`` with the best settings of the study of ``plan``, under a name that says so."""
    _, factors = cell.parts()
    rest, setting = _without_setting(cell)
    named = "-".join([*([setting] if setting else []), "tuned"])
    words = (f"--tuned={plan.record}", f"--setting={named}", f"--results={plan.results}")
    return replace(cell, overrides=(*rest, *words, *(f"--{key}={value}" for key, value in factors.items())))


def _without_setting(cell: Cell) -> tuple[tuple[str, ...], str]:
    """Return the words of a cell that its study shares, and the name of its setting."""
    rest, _ = cell.parts()
    named = [word.partition("=")[2] for word in rest if word.startswith("--setting=")]
    shared = tuple(word for word in rest if not word.startswith(("--setting=", "--results=")))
    return shared, "".join(named)


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    for key in given:
        if key not in _KEYS:
            raise ValueError(f"The key tune of a grid cannot contain {key!r}. {suggestion(key, _KEYS)}")
    if len(given.keys() & {*_BUDGETS}) != 1:
        raise ValueError(
            "The key tune of a grid needs one budget, the same for all of its strategies: write trials: 12, "
            "or epochs or seconds."
        )
    return given
