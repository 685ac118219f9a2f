"""The claim that at test time a strategy knows an image and nothing else."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from cl_bench.check.subject import Run
from cl_bench.check.verdict import Broken

_TOLERANCE = 1e-5  # of the largest logit: a product over another batch size rounds in another order


def prediction(run: Run) -> str:
    """Claim: logits depend on the image alone, not on its company, its place, its label or its experience."""
    _require_images_alone(run)
    images, labels = run.stream.probe()
    together = run.logits(images)
    expected = (len(images), run.experiences[-1].num_classes_seen)
    if tuple(together.shape) != expected:
        raise Broken(
            f"logits of {expected[0]} images have the shape {tuple(together.shape)}, not {expected}: return "
            "one column for each class seen"
        )
    reversed_ = run.logits(images.flip(0)).flip(0)
    alone = torch.cat([run.logits(image[None]) for image in images])
    by_experience = torch.cat([run.logits(images[mask]) for mask in _masks(run, labels)])
    for company, logits in (
        ("in another order", reversed_),
        ("alone", alone),
        ("with those of its experience", by_experience),
    ):
        _require_equal(f"an image {company} gets other logits than among all", logits, together)
    told = run.tested(images, labels)
    lied_to = run.tested(images, labels.flip(0))
    _require_equal("test_step gives other logits when the labels are others", told, lied_to)
    return f"{len(images)} images together, reversed, alone and by experience; other labels change nothing"


def _require_images_alone(run: Run) -> None:
    parameters = list(inspect.signature(run.strategy.forward).parameters.values())
    if len(parameters) != 1:
        names = ", ".join(str(parameter) for parameter in parameters)
        raise Broken(f"forward takes ({names}): let it take the images alone")


def _masks(run: Run, labels: Tensor) -> list[Tensor]:
    return [(labels >= e.classes.start) & (labels < e.classes.stop) for e in run.experiences]


def _require_equal(otherwise: str, one: Tensor, other: Tensor) -> None:
    change = float((one - other).abs().max())
    if not change <= _TOLERANCE * max(1.0, float(other.abs().max())):
        raise Broken(
            f"{otherwise}, by {change:.1e}: compute logits from each image alone, in evaluation mode"
        )
