"""The claim that a strategy learns from the training images of the experience at hand, and from no other."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cl_bench.check.subject import Broken, Run
from cl_bench.data.experience import Experience


class Sightings:
    """What was seen of the stream while a strategy trained: images read, and images that met the backbone.

    Args:
        run: The strategy and its stream.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        stream = run.stream
        self._known = {_key(image): index for index, image in enumerate(stream.train.images)}
        self._known |= {_key(image): -1 for image in stream.test.images}
        self._shown: set[int] = set()
        self.violations: list[str] = []
        self.read = 0

    @contextmanager
    def during(self, experience: Experience) -> Iterator[None]:
        """Watch while ``experience`` is learnt."""
        stream = self._run.stream
        stream.train.read.clear()
        stream.test.read.clear()
        self._shown.clear()
        embedding = self._run.strategy.backbone.vit.get_submodule("patch_embed")
        handle = embedding.register_forward_pre_hook(self._see)
        try:
            yield
        finally:
            handle.remove()
        own = stream.training_images(experience)
        self.read += len(stream.train.read)
        for what, images in (("reads", stream.train.read), ("shows the backbone", self._shown - {-1})):
            if foreign := images - own:
                others = sorted({stream.train.targets[image] // 2 + 1 for image in foreign})
                self.violations.append(
                    f"experience {experience.index + 1} {what} {len(foreign)} training images of experience "
                    f"{', '.join(map(str, others))}"
                )
        if stream.test.read or -1 in self._shown:
            self.violations.append(f"experience {experience.index + 1} looks at test images")

    def _see(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._shown |= {self._known[key] for image in inputs[0] if (key := _key_of(image)) in self._known}


def data(sightings: Sightings) -> str:
    """Claim: an experience sees its own training images, no others and no test image."""
    if sightings.violations:
        raise Broken(
            f"{sightings.violations[0]}: use what the hooks are given, and keep no images of other "
            "experiences"
        )
    return f"{sightings.read} images read, each in its own experience; nothing else met the backbone"


def _key(image: Tensor) -> bytes:
    return image.contiguous().numpy().tobytes()


def _key_of(image: Tensor) -> bytes:
    """Return the pixels of an image in [0, 1] as they are stored."""
    return _key((image.detach().float().cpu() * 255).round().clamp(0, 255).to(torch.uint8))


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
