"""Whether a method learns: its first experience on a stream of separable classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from cl_bench.check.subject import Broken, Subject, strong

_BY_CHANCE = 1e-4
_SHORT, _LONG = 20, 100  # epochs


class _Losses(Callback):
    """Records the loss of every step."""

    def __init__(self) -> None:
        self.of_steps: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.of_steps.append(float(loss))


@dataclass(frozen=True)
class Learnt:
    """What the first experience of a separable stream has taught.

    Attributes:
        classes: Number of its classes.
        correct: Share of its test images that are classified correctly, among these classes.
        first: Mean loss of the first epoch; None without a step.
        last: Mean loss of the last epoch; None without a step.
        epochs: Number of epochs.
    """

    classes: int
    correct: float
    first: float | None
    last: float | None
    epochs: int

    @property
    def needed(self) -> float:
        """Share of the classes that guesses reach with a probability below 1e-4.

        A method that has learnt nothing may give all images of a class the same guess, so the classes are
        counted and not the images: k of n are guessed with a binomial probability.
        """
        n = self.classes
        tail, k = 0.0, n + 1
        while tail < _BY_CHANCE:
            k -= 1
            tail += math.comb(n, k) * (n - 1) ** (n - k) / n**n
        return (k + 1) / n

    @property
    def fault(self) -> str | None:
        """What has not been learnt, in a phrase."""
        if self.correct < self.needed:
            return (
                f"after {self.epochs} epochs of experience 1, {self.correct:.0%} of its test images are "
                f"classified correctly, and guesses reach less than {self.needed:.0%} of {self.classes} "
                "classes"
            )
        if self.first is not None and self.last is not None and not self.last < self.first:
            return f"the loss does not fall: {self.first:.2g} in the first epoch, {self.last:.2g} in the last"
        return None


def learnt(subject: Subject) -> Learnt:
    """Train ``subject`` on the first experience of a separable stream, longer if it needs that."""
    found = _learnt(subject, _SHORT)
    return _learnt(subject, _LONG) if found.fault else found


def _learnt(subject: Subject, epochs: int) -> Learnt:
    losses = _Losses()
    settings = {
        "data.num_experiences": 2,
        "data.classes_per_experience": 12,
        "data.images_per_class": 4,
        "data.separable": True,
        "data.batch_size": 24,
        "trainer.max_epochs": epochs,
    }
    run = strong(subject.run(settings, [losses]), weight_decay=None)
    first = run.experiences[0]
    run.learn(first)
    images, labels = run.stream.probe()
    own = labels < first.classes.stop
    right = run.logits(images[own]).argmax(dim=1) == labels[own]
    steps = losses.of_steps
    of_epoch = max(len(steps) // epochs, 1)
    return Learnt(
        len(first.classes),
        float(right.float().mean()),
        mean(steps[:of_epoch]) if steps else None,
        mean(steps[-of_epoch:]) if steps else None,
        epochs,
    )


def learning(found: Learnt) -> str:
    """Claim: on separable classes, the first experience ends far above chance, and the loss falls."""
    if found.fault:
        raise Broken(
            f"{found.fault}: let the loss fall as the logits of the own classes of images rise, and keep "
            "what was trained"
        )
    falls = "" if found.first is None else f", the loss falls from {found.first:.2g} to {found.last:.2g}"
    return f"{found.correct:.0%} of test images of experience 1 are right{falls}"
