"""Whether those who run cells and those who read results look at one and the same folder."""

from __future__ import annotations

import platform
import secrets
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a job that answers imports nothing of the stack
    from cl_bench.grid.engine import Engine


def require_shared(folder: Path, engine: Engine) -> None:
    """Have every machine of ``engine`` read a token in ``folder`` and write one back.

    Raises:
        ValueError: If a machine does not see the folder as this one does.
        OSError: If it cannot be written here.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    asked = folder / f".token-{token}"
    try:
        asked.write_text(token, encoding="ascii")
        for machine, name in engine.ask(partial(answer, asked)):
            if name is None or not _reads(folder / name, token):
                raise ValueError(
                    f"{machine} does not see the results folder {folder} as this machine does: mount one "
                    "folder under the same path on every machine, and name it with --results."
                )
    finally:
        for path in folder.glob(f"{asked.name}*"):
            path.unlink(missing_ok=True)


def answer(asked: Path) -> tuple[str, str | None]:
    """Return the name of this machine, and that of a file beside ``asked`` that repeats it, or None."""
    machine = platform.node()
    reply = asked.with_name(f"{asked.name}-{secrets.token_hex(4)}")
    try:
        reply.write_text(asked.read_text(encoding="ascii"), encoding="ascii")
    except OSError:
        return machine, None
    return machine, reply.name


def _reads(path: Path, token: str) -> bool:
    try:
        return path.read_text(encoding="ascii") == token
    except OSError:
        return False
