"""What is said about a claim."""

from __future__ import annotations

from dataclasses import dataclass


class Broken(Exception):
    """A claim does not hold; the message says what was found and what to do."""


@dataclass(frozen=True)
class Verdict:
    """What was found about one claim.

    Attributes:
        claim: What is claimed, in words.
        passed: Whether it holds.
        why: What was measured, or what broke it and the remedy.

    >>> print(Verdict("frozen parts stay frozen", passed=True, why="31 tensors, bit by bit"))
    passed  frozen parts stay frozen: 31 tensors, bit by bit
    """

    claim: str
    passed: bool
    why: str

    def __str__(self) -> str:
        """Return one line."""
        return f"{'passed' if self.passed else 'FAILED'}  {self.claim}: {self.why}"
