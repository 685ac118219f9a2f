"""Claims about bits: the same seed gives the same ones, and so does a run that is cut off."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cl_bench.check.data import Sightings
from cl_bench.check.subject import Moment, Run, Subject, differing, some
from cl_bench.check.verdict import Broken
from cl_bench.loop.checkpoint import Checkpoint, Checkpoints
from cl_bench.loop.continuation import resumption
from cl_bench.processes.state import NoPlace

_WORDS = {
    "expanded": "the pass over its data",
    "training": "its steps",
    "merging": "the pass after them",
    "testing": "its evaluation",
}


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


def checkpoint(subject: Subject) -> str:
    """Claim: a run that is cut off goes on to the same bits, wherever in an experience that was.

    A run writes its checkpoints halfway through the stream: before the pass over the data, the steps, the
    pass after them and the evaluation. From each, a strategy that was built anew goes on to the end.
    """
    run = subject.run()
    half = len(run.experiences) // 2
    with TemporaryDirectory() as name:
        kept = _Kept(Path(name), half)
        run.trainer.run(run.strategy, run.stream, checkpoints=kept)
        whole = run.moment()
        for phase, path in kept.phases.items():
            _require_equal(_gone_on(subject, path), whole, phase)
    return f"cut off before {', '.join(kept.phases)} of experience {half + 1}, and ended in the same bits"


class _Kept(Checkpoints):
    """Keeps the checkpoints of one experience, each in a folder of its own."""

    def __init__(self, folder: Path, experience: int) -> None:
        super().__init__(folder, cell="")
        self.phases: dict[str, Path] = {}
        self._experience = experience

    def write(self, checkpoint: Checkpoint) -> Path:
        """Keep ``checkpoint`` if it is one of the experience."""
        folder = self.folder / checkpoint.phase
        if checkpoint.experience == self._experience:
            self.phases[_WORDS[checkpoint.phase]] = folder
            return Checkpoints(folder, cell="").write(checkpoint)
        return folder

    def clear(self) -> None:
        """Keep them although the run is done: others go on from them."""


def _gone_on(subject: Subject, folder: Path) -> Moment:
    run = subject.run()
    try:
        result = run.trainer.run(run.strategy, run.stream, checkpoints=Checkpoints(folder, cell=""))
    except NoPlace as error:
        raise Broken(str(error).rstrip(".")) from error
    assert resumption(result) is not None
    return run.moment()


def _require_equal(found: Moment, expected: Moment, phase: str) -> None:
    when = f"differ at the end of a run that was cut off before {phase}"
    names = differing(found.state, expected.state)
    if names:
        raise Broken(
            f"{some(names)} {when}: keep what training depends on in parameters, in buffers, or where "
            "get_extra_state of a module returns it"
        )
    if not torch.equal(found.logits, expected.logits):
        raise Broken(
            f"logits {when}, although parameters and buffers agree: keep what they depend on in a buffer"
        )
