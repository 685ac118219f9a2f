"""A check that the machines that run cells and this machine see the same results folder."""

from __future__ import annotations

import platform
import secrets
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the job that calls reply() must not import torch
    from cl_bench.grid.engine import Engine


def require_shared(folder: Path, engine: Engine) -> None:
    """Let every machine of ``engine`` read a token in ``folder`` and write a copy of it.

    Raises:
        ValueError: If a machine does not see the folder as this one does.
        OSError: If this machine cannot write to the folder.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    file = folder / f".token-{token}"
    try:
        file.write_text(token, encoding="ascii")
        for machine, name in engine.call(partial(reply, file)):
            if name is None or not _holds(folder / name, token):
                raise ValueError(
                    f"{machine} does not see the results folder {folder} as this machine does: mount one "
                    "folder under the same path on every machine, and name it with --results."
                )
    finally:
        for path in folder.glob(f"{file.name}*"):
            path.unlink(missing_ok=True)


def reply(file: Path) -> tuple[str, str | None]:
    """Copy the token in ``file``; return the name of this machine and that of the copy, None if it failed."""
    machine = platform.node()
    copy = file.with_name(f"{file.name}-{secrets.token_hex(4)}")
    try:
        copy.write_text(file.read_text(encoding="ascii"), encoding="ascii")
    except OSError:
        return machine, None
    return machine, copy.name


def _holds(path: Path, token: str) -> bool:
    try:
        return path.read_text(encoding="ascii") == token
    except OSError:
        return False
