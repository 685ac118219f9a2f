"""The claims in the order in which they are checked; each is a function in the file of its subject."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

from cl_bench.check import cost, data, reproduction, training
from cl_bench.check.subject import Broken, Subject, Verdict
from cl_bench.errors import sentence


class Evidence:
    """The trainings that the claims examine; each runs when the first claim needs it.

    Args:
        subject: The strategy under check.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @cached_property
    def observed(self) -> training.Observed:
        """A training under a strong optimizer, observed four times in every experience."""
        return training.observed(self.subject)

    @cached_property
    def plain(self) -> reproduction.Plain:
        """A training that runs as it is configured."""
        return reproduction.plain(self.subject)

    @cached_property
    def measured(self) -> cost.Measured:
        """A training on a long stream, with the cost of every experience."""
        return cost.measured(self.subject)


CLAIMS: dict[str, Callable[[Evidence], str]] = {
    "the first experience is learnt": lambda e: training.learning(training.learnt(e.subject)),
    "the function is unchanged at the start of an experience": lambda e: training.start(*e.observed),
    "frozen parts stay frozen": lambda e: training.frozen(*e.observed),
    "old heads are untouched": lambda e: training.old_head(*e.observed),
    "after_training keeps the trained features": lambda e: training.after_training(*e.observed),
    "the optimizer's parameters are the strategy's own": lambda e: training.optimizer(*e.observed),
    "no task id at test time": lambda e: data.prediction(e.plain.run),
    "no data of other experiences is seen": lambda e: data.training(e.plain.seen),
    "training data are kept only as declared": lambda e: data.keeping(data.kept(e.subject), e.plain.seen),
    "the same seed gives the same bits": lambda e: reproduction.seed(e.plain, reproduction.plain(e.subject)),
    "a resumed run ends in the same bits": lambda e: reproduction.resume(e.subject),
    "stored state grows only as declared": lambda e: cost.state(*e.measured),
    "float32 and bfloat16 both run": lambda e: reproduction.precision(e.subject),
    "the cost of a step grows only as declared": lambda e: cost.step(*e.measured),
    "what is declared constant never changes": lambda e: training.constant(*e.observed),
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
    except Exception as error:  # a strategy may raise anything, and the other claims are still checked
        return Verdict(claim, passed=False, why=f"it stopped with: {sentence(error)}")
