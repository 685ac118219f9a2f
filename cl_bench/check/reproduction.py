"""Claims about bits: the same from the same seed, the same after a resumption, and precise in bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cl_bench.check.data import ImagesSeen
from cl_bench.check.subject import Broken, Moment, Run, State, Subject, copied_state, differing, some
from cl_bench.loop.checkpoint import Checkpoint, Checkpoints
from cl_bench.loop.continuation import resumption
from cl_bench.processes.state import NoPlace

PRECISIONS = ("32-true", "bf16-mixed")

_WORDS = {
    "expanded": "the pass over its data",
    "training": "its steps",
    "merging": "the pass after them",
    "testing": "its evaluation",
}


@dataclass(frozen=True)
class Plain:
    """A training that runs as it is configured.

    Attributes:
        run: The strategy, after training.
        built: As the constructor made it.
        moments: After every experience.
        seen: The images that the strategy saw.
    """

    run: Run
    built: State
    moments: list[Moment]
    seen: ImagesSeen


def plain(subject: Subject) -> Plain:
    """Train ``subject`` on the tiny stream, and observe it after every experience."""
    run = subject.run()
    built, seen = copied_state(run.strategy), ImagesSeen(run)
    moments = []
    for experience in run.experiences:
        with seen.during(experience):
            run.learn(experience)
        moments.append(run.moment())
    return Plain(run, built, moments, seen)


def seed(one: Plain, other: Plain) -> str:
    """Claim: two trainings from one seed end in the same bits, whatever was drawn before."""
    of_constructor = differing(one.built, other.built)
    for index, (mine, its) in enumerate(zip(one.moments, other.moments, strict=True), 1):
        names = differing(mine.state, its.state)
        if drawn := [name for name in names if name in of_constructor]:
            raise Broken(
                f"{some(drawn)} differ after experience {index}, and before the first one, so the "
                "constructor draws them: draw random numbers in the hooks, where the generators are seeded. "
                "What serves the whole stream is drawn in the first expand, and declared by drawn_once in "
                "Promises if it changes a feature"
            )
        if names:
            raise Broken(
                f"{some(names)} differ after experience {index}: draw random numbers in the hooks, from "
                "torch's, NumPy's and Python's global generators, which are seeded there"
            )
        if not torch.equal(mine.logits, its.logits):
            raise Broken(
                f"logits differ after experience {index}, although parameters and buffers agree: keep in a "
                "buffer what they depend on, and draw nothing at test time"
            )
    tensors, experiences = len(one.moments[-1].state), len(one.moments)
    return f"{tensors} tensors and all logits agree after each of {experiences} experiences"


def resume(subject: Subject) -> str:
    """Claim: a run that was interrupted resumes to the same bits, wherever in an experience that was.

    A run writes its checkpoints halfway through the stream: before the pass over the data, the steps, the
    second epoch, the pass after training, and the evaluation. From each, a newly built strategy runs to the
    end of the stream. Before that, another one learns the classes in another order: it overwrites whatever
    is kept outside of strategies, in a class or a file, which is lost when a process ends.
    """
    run = subject.run()
    half = len(run.experiences) // 2
    with TemporaryDirectory() as name:
        kept = _Kept(Path(name), half)
        run.trainer.run(run.strategy, run.stream, checkpoints=kept)
        whole = run.moment()
        other = subject.run({"data.order": "python:1", "trainer.max_epochs": 1})
        for experience in other.experiences:
            other.learn(experience)
        for moment, folder in kept.folders.items():
            _require_equal(_resumed(subject, folder), whole, moment)
    return f"interrupted before {', '.join(kept.folders)} of experience {half + 1}; the same bits each time"


class _Kept(Checkpoints):
    """Keeps every checkpoint of one experience, each in its own folder."""

    def __init__(self, folder: Path, experience: int) -> None:
        super().__init__(folder, cell="", every=0)
        self.folders: dict[str, Path] = {}
        self._experience = experience

    def write(self, checkpoint: Checkpoint) -> Path:
        """Keep ``checkpoint`` if it is one of the experience."""
        if checkpoint.experience != self._experience:
            return self.folder
        before = f"epoch {checkpoint.epoch + 1}" if checkpoint.epoch else _WORDS[checkpoint.phase]
        self.folders[before] = self.folder / before.replace(" ", "-")
        return Checkpoints(self.folders[before], cell="").write(checkpoint)

    def clear(self) -> None:
        """Keep the checkpoints after the run: other runs resume from them."""


def _resumed(subject: Subject, folder: Path) -> Moment:
    run = subject.run()
    try:
        result = run.trainer.run(run.strategy, run.stream, checkpoints=Checkpoints(folder, cell=""))
    except NoPlace as error:
        raise Broken(str(error).rstrip(".")) from error
    assert resumption(result) is not None
    return run.moment()


def _require_equal(found: Moment, expected: Moment, interrupted: str) -> None:
    when = f"differ at the end of a run that was interrupted before {interrupted}"
    names = differing(found.state, expected.state)
    if names:
        raise Broken(
            f"{some(names)} {when}: keep what training depends on in parameters and buffers, or, if it is a "
            "few numbers, in what get_extra_state of a module returns; all of it counts as stored"
        )
    if not torch.equal(found.logits, expected.logits):
        raise Broken(
            f"logits {when}, although parameters and buffers agree: keep in a buffer what they depend on"
        )


def precision(subject: Subject) -> str:
    """Claim: in float32 and in mixed bfloat16 a stream runs to its end, and what is kept stays precise."""
    accuracies = []
    for name in PRECISIONS:
        run = subject.run({"trainer.precision": name})
        result = run.trainer.run(run.strategy, run.stream)
        _require_precise(run, name)
        accuracies.append(f"{name} ends at {result.metrics()['acc/sample']:.0f} %")
    return ", ".join(accuracies)


def _require_precise(run: Run, name: str) -> None:
    state = copied_state(run.strategy)
    coarse = [key for key, value in state.items() if value.dtype in (torch.bfloat16, torch.float16)]
    if coarse:
        raise Broken(
            f"under {name} the strategy keeps {some(coarse)} in half precision: compute in float32 what is "
            "kept"
        )
    endless = [key for key, value in state.items() if not value.isfinite().all()]
    if endless:
        raise Broken(f"under {name}, {some(endless)} are not finite: find the cause with --detect_anomaly")
