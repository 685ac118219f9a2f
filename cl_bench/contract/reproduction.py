"""Claims about bits: the same seed gives the same ones, and a checkpoint keeps them all."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch

from cl_bench.contract.data import Sightings
from cl_bench.contract.subject import Moment, Run, Subject, differing, some
from cl_bench.contract.verdict import Broken


@dataclass(frozen=True)
class Plain:
    """A training that nobody disturbed.

    Attributes:
        run: The strategy as it was left.
        moments: After every experience.
        sightings: What was seen of the stream meanwhile.
    """

    run: Run
    moments: list[Moment]
    sightings: Sightings


def plain(subject: Subject) -> Plain:
    """Train ``subject`` on the tiny stream, and look at it after every experience."""
    run = subject.run()
    sightings = Sightings(run)
    moments = []
    for experience in run.experiences:
        with sightings.during(experience):
            run.learn(experience)
        moments.append(run.moment())
    return Plain(run, moments, sightings)


def seed(one: Plain, other: Plain) -> str:
    """Claim: two trainings from one seed end in the same bits, whatever the generators held before."""
    for index, (mine, its) in enumerate(zip(one.moments, other.moments, strict=True), 1):
        names = differing(mine.state, its.state)
        if names:
            raise Broken(
                f"{some(names)} differ after experience {index}: draw random numbers in the hooks, where the "
                "generators are seeded, and not in the constructor or from a generator of your own"
            )
        if not torch.equal(mine.logits, its.logits):
            raise Broken(
                f"logits differ after experience {index}, although parameters and buffers agree: keep what "
                "they depend on in a buffer, and draw nothing at test time"
            )
    tensors, experiences = len(one.moments[-1].state), len(one.moments)
    return f"{tensors} tensors and all logits agree after each of {experiences} experiences"


def checkpoint(subject: Subject, original: Plain) -> str:
    """Claim: the state dict is all that the next experience depends on.

    After half of the stream it is saved, and read by ``torch.load(weights_only=True)`` into a strategy that
    was built anew and expanded; logits are the same then, and training on ends in the same bits.
    """
    half = len(original.moments) // 2
    saved = original.moments[half - 1]
    run = subject.run()
    for experience in run.experiences[:half]:
        run.strategy.expand(experience)
    try:
        run.strategy.load_state_dict(_from_disk(saved))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise Broken(
            f"the state does not load into a new strategy that was expanded ({reason}): let expand make "
            "whatever is saved"
        ) from error
    now = run.moment()
    _require_equal(now, saved, "after loading")
    for index in range(half, len(run.experiences)):
        run.learn(run.experiences[index])
        _require_equal(run.moment(), original.moments[index], f"{index - half + 1} experiences after loading")
    return f"saved after experience {half}, loaded, and trained on to the same bits"


def _from_disk(moment: Moment) -> dict[str, torch.Tensor]:
    file = io.BytesIO()
    torch.save(moment.state, file)
    file.seek(0)
    loaded: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
    return loaded


def _require_equal(found: Moment, expected: Moment, when: str) -> None:
    names = differing(found.state, expected.state)
    if names:
        raise Broken(f"{some(names)} differ {when}: keep what training depends on in parameters or buffers")
    if not torch.equal(found.logits, expected.logits):
        raise Broken(
            f"logits differ {when}, although parameters and buffers agree: keep what they depend on in a "
            "buffer"
        )
