"""Lists of files, and the hash by which two of them are told apart."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable


def fingerprint(files: Iterable[str]) -> str:
    r"""Return the sha256 of the sorted paths, one a line, without a newline at the end.

    >>> fingerprint(["b/1.jpg", "a/2.jpg"]) == hashlib.sha256(b"a/2.jpg\nb/1.jpg").hexdigest()
    True
    """
    return hashlib.sha256(b"\n".join(sorted(os.fsencode(file) for file in files))).hexdigest()


def require_fingerprint(name: str, files: Iterable[str], expected: str) -> None:
    """Refuse a list that is not the published one.

    Raises:
        ValueError: If its hash differs from ``expected``.
    """
    found = fingerprint(files)
    if found != expected:
        raise ValueError(
            f"The list {name} has the sha256 {found[:16]}… and {expected[:16]}… is published: "
            "its copy in this checkout has been changed, restore it."
        )
