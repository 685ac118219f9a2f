from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from cl_bench.check.command import CLAIMS, layer, verdicts
from cl_bench.check.subject import Subject, Verdict
from cl_bench.run.run import quiet


class Verdicts(dict[str, Verdict]):
    """Verdicts by claim."""

    @property
    def broken(self) -> dict[str, str]:
        """Why each claim that does not hold is broken."""
        return {claim: verdict.why for claim, verdict in self.items() if not verdict.passed}


@pytest.fixture(scope="session")
def checked() -> Callable[..., Verdicts]:
    """Function that checks a strategy, by the name that the command takes, and returns the verdicts."""
    return _checked


def _checked(name: str, *overrides: str, claims: Iterable[str] = CLAIMS) -> Verdicts:
    claims = list(claims)
    with quiet():
        found = Verdicts({one.claim: one for one in verdicts(Subject(layer(name), overrides), claims)})
    assert list(found) == claims
    return found
