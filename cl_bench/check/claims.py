"""The claims in the order in which they are checked; each is a function in the file of its subject."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

from cl_bench.check import cost, data, reproduction, stability
from cl_bench.check.reproduction import Plain, plain
from cl_bench.check.stability import Observed, observed
from cl_bench.check.subject import LONG, Broken, Run, Subject, Verdict
from cl_bench.errors import sentence


class Evidence:
    """The trainings that the claims look at; each is made when the first claim asks for it.

    Args:
        subject: The strategy under check.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.promises = subject.fresh.strategy.promises  # which may depend on its settings

    @cached_property
    def observed(self) -> list[Observed]:
        """A training looked at from close by, under a strong optimizer."""
        return observed(self.subject)

    @cached_property
    def plain(self) -> Plain:
        """A training that nobody disturbed."""
        return plain(self.subject)

    @cached_property
    def long(self) -> tuple[Run, list[cost.Experienced]]:
        """A training on a long stream."""
        return cost.experienced(self.subject)


CLAIMS: dict[str, Callable[[Evidence], str]] = {
    "the function is unchanged at the start of an experience": lambda e: stability.start(
        e.observed, e.promises
    ),
    "frozen parts stay frozen": lambda e: stability.frozen(e.observed, e.subject.fresh),
    "old heads are untouched": lambda e: stability.old_head(e.observed, e.promises),
    "merged equals unmerged": lambda e: stability.merge(e.observed, e.promises),
    "the optimizer's parameters are the strategy's own": lambda e: stability.optimizer(e.observed),
    "no task id at test": lambda e: data.prediction(e.plain.run),
    "no data of other experiences is seen": lambda e: data.data(e.plain.sightings),
    "the same seed gives the same bits": lambda e: reproduction.seed(e.plain, plain(e.subject)),
    "a run that is cut off ends in the same bits": lambda e: reproduction.checkpoint(e.subject),
    "memory is bounded as declared": lambda e: cost.memory(*e.long),
    "float32 and bfloat16 both run": lambda e: reproduction.precision(e.subject),
    f"a step costs in experience {LONG} what it costs in experience 2": lambda e: cost.step(
        e.long[1], e.promises
    ),
}
"""What is claimed of every strategy, in words, and the check of it."""


def verdicts(subject: Subject) -> Iterator[Verdict]:
    """Check every claim about ``subject``, one after the other."""
    evidence = Evidence(subject)
    for claim, check in CLAIMS.items():
        yield _verdict(claim, check, evidence)


def _verdict(claim: str, check: Callable[[Evidence], str], evidence: Evidence) -> Verdict:
    try:
        return Verdict(claim, passed=True, why=check(evidence))
    except Broken as broken:
        return Verdict(claim, passed=False, why=f"{broken}.")
    except Exception as error:  # a strategy under check may raise anything; the other claims still count
        return Verdict(claim, passed=False, why=f"it stopped with: {sentence(error)}")
