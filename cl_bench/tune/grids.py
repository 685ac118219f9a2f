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
_OPTIONS = ("metric", "val_fraction", "seed", "sensitivity", "wandb")
_TYPES: dict[str, tuple[type, ...]] = {
    "experiences": (str,),  # YAML reads a key "on" as true
    "space": (str, dict),
    "untuned": (bool,),
    **dict.fromkeys(_BUDGETS, (int, float)),
    "metric": (str,),
    "val_fraction": (float,),
    "seed": (int,),
    **dict.fromkeys(("sensitivity", "wandb"), (bool,)),
}


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
    wanted: dict[str, Plan] = {}
    for one in plans.values():
        if one.space.settings and wanted.setdefault(one.name, one) != one:
            raise ValueError(
                f"Two studies of the grid have the name {one.name}: rename a config of one of them."
            )
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
    from cl_bench.tune.space import read_space
    from cl_bench.tune.study import FIRST, Plan, stem

    given = _checked(grid.tune)
    (unit,) = given.keys() & {*_BUDGETS}
    rest, setting = _without_setting(cell)
    spaces: Any = given.get("space", {})
    space = spaces.get(cell.strategy) if isinstance(spaces, dict) else spaces
    return Plan(
        strategy=cell.strategy,
        dataset=cell.dataset,
        space=read_space(space or stem(cell.strategy)),
        unit=unit,
        budget=given[unit],
        on=given.get("experiences", FIRST),
        results=Path(grid.results),
        fixed=rest,
        order=grid.orders[0],
        setting=setting,
        **{key: given[key] for key in _OPTIONS if key in given},
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
    for key, value in given.items():
        if key not in _TYPES:
            raise ValueError(f"The key tune of a grid cannot contain {key!r}. {suggestion(key, _TYPES)}")
        if type(value) not in _TYPES[key]:
            names = " or ".join(one.__name__ for one in _TYPES[key])
            raise ValueError(f"In the key tune of a grid, {key} must be a {names}, not {value!r}.")
    if len(given.keys() & {*_BUDGETS}) != 1:
        raise ValueError(
            "The key tune of a grid needs one budget, the same for all of its strategies: write trials: 12, "
            "or epochs or seconds."
        )
    return given
