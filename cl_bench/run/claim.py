"""A lock on a cell: one process runs it, and the lock is released if that process dies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import SoftFileLease, Timeout

# All processes must use the same lease. It exceeds the 60 seconds for which NFS may cache the attributes of a
# file by four heartbeats.
_LEASE_SECONDS = 120.0
_BEAT_SECONDS = 15.0
_LOOK_SECONDS = 1.0


class Held(RuntimeError):
    """A running process holds the lock on the cell."""


@contextmanager
def claim(path: Path, wait: Callable[[str], None] | None = None) -> Iterator[Callable[[], None]]:
    """Hold the lock that the file ``path`` stands for; at most one process holds it at a time.

    The file is created atomically, also on shared file systems, and its holder touches it every 15 seconds. A
    dead holder on this machine loses the lock at once. A holder on another machine loses it when the file has
    not changed for two minutes, by the clock of the process that waits; clocks of two machines are never
    compared. A holder that is suspended for longer, and then continues, must not write: the context yields a
    function for it to call before every write, which raises once another process holds the lock.

    Args:
        path: The file; its folder is created if necessary.
        wait: Called with a sentence that names the holder, before waiting for it; None raises instead.

    Raises:
        Held: If another process holds the lock and ``wait`` is None; from the yielded function, if this
            process has lost the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lease = SoftFileLease(path, lease_duration=_LEASE_SECONDS, heartbeat_interval=_BEAT_SECONDS)
    try:
        lease.acquire(timeout=0)
    except Timeout as error:
        sentence = f"This cell is being run by {_holder(lease)}."
        if wait is None:
            raise Held(sentence) from error
        wait(sentence)
        lease.acquire(poll_interval=_LOOK_SECONDS)
    token = lease.token
    assert token is not None

    def require() -> None:
        try:
            if token in path.read_text(encoding="utf-8"):
                return
        except FileNotFoundError:  # its successor has ended
            pass
        raise Held(
            f"This process was stopped for more than {_LEASE_SECONDS:g} seconds and lost the cell to "
            f"{_holder(lease)}; it has written nothing since."
        )

    try:
        yield require
    finally:
        lease.release()


def _holder(lease: SoftFileLease) -> str:
    owner = lease.owner
    return f"process {owner.pid} on {owner.hostname}" if owner else "another process"
