"""A claim on a cell: of all processes that would run it, one does, and the death of that one frees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import SoftFileLease, Timeout

# Every process that claims must agree on the lease. It is longer than the minute for which NFS may show old
# attributes of a file, with four beats to spare.
_LEASE_SECONDS = 120.0
_BEAT_SECONDS = 15.0
_LOOK_SECONDS = 1.0


class Held(RuntimeError):
    """Another process has claimed the cell and is alive."""


@contextmanager
def claim(path: Path, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the claim that the file ``path`` stands for, which at most one process does at a time.

    The file is created in one step, which shared file systems guarantee too, and its holder touches it every
    15 seconds. A holder of this machine that is dead loses the claim at once. One of another machine loses
    it when the file has stayed as it is for two minutes, by the clock of whoever waits; the clocks of two
    machines are never compared. A holder that sleeps for longer, and then goes on, shares the cell with its
    successor: both write the same.

    Args:
        path: The file; its folder is made if there is none.
        wait: Told in one sentence who holds the claim before waiting for it; None does not wait.

    Raises:
        Held: If another process holds the claim and ``wait`` is None.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lease = SoftFileLease(path, lease_duration=_LEASE_SECONDS, heartbeat_interval=_BEAT_SECONDS)
    try:
        lease.acquire(timeout=0)
    except Timeout as error:
        owner = lease.owner
        holder = f"process {owner.pid} on {owner.hostname}" if owner else "another process"
        sentence = f"This cell is being run by {holder}."
        if wait is None:
            raise Held(sentence) from error
        wait(sentence)
        lease.acquire(poll_interval=_LOOK_SECONDS)
    try:
        yield
    finally:
        lease.release()
