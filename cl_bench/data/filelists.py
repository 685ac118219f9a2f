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
    return _sha256(sorted(os.fsencode(file) for file in files))


def order_fingerprint(names: Iterable[str]) -> str:
    r"""Return the sha256 of the names in their order, one a line, without a newline at the end.

    >>> order_fingerprint(["b", "a"]) == hashlib.sha256(b"b\na").hexdigest()
    True
    """
    return _sha256(os.fsencode(name) for name in names)


def require_fingerprint(name: str, files: Iterable[str], expected: str) -> None:
    """Refuse a list that is not the published one, in whatever order.

    Raises:
        ValueError: If its hash differs from ``expected``.
    """
    _require_equal(name, fingerprint(files), expected)


def require_order(name: str, names: Iterable[str], expected: str) -> None:
    """Refuse a list that is not the published one, or is in another order.

    Raises:
        ValueError: If its hash differs from ``expected``.
    """
    _require_equal(name, order_fingerprint(names), expected)


def _sha256(lines: Iterable[bytes]) -> str:
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


def _require_equal(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(
            f"The list {name} has the sha256 {found[:16]}… and {expected[:16]}… is published: "
            "its copy in this checkout has been changed, restore it."
        )
