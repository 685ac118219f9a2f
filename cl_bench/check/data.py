"""What a strategy may see: the images of the experience at hand, and at test time one image at a time."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cl_bench.check.stream import CLASSES_PER_EXPERIENCE
from cl_bench.check.subject import Broken, Run
from cl_bench.data.experience import Experience

_TOLERANCE = 1e-5  # of the largest logit: products over another batch size round in another order
_TEST = -1  # in place of the index of a training image


class ImagesSeen:
    """The images that a strategy read while it trained, and those that it sent through the backbone.

    Args:
        run: The strategy and its stream.

    Attributes:
        read: Number of training images read, counted once in each experience.
        violations: What was seen that should not have been, each in a phrase.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        stream = run.stream
        self._known = {_key(image): index for index, image in enumerate(stream.train.images)}
        self._known |= {_key(image): _TEST for image in stream.test.images}
        self._shown: set[int] = set()
        self.violations: list[str] = []
        self.read = 0

    @contextmanager
    def during(self, experience: Experience) -> Iterator[None]:
        """Watch while the strategy learns ``experience``."""
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
        for what, images in (("reads", stream.train.read), ("shows the backbone", self._shown - {_TEST})):
            if foreign := images - own:
                labels = {stream.train.targets[image] for image in foreign}
                others = sorted({label // CLASSES_PER_EXPERIENCE + 1 for label in labels})
                self.violations.append(
                    f"experience {experience.index + 1} {what} {len(foreign)} training images of experience "
                    f"{', '.join(map(str, others))}"
                )
        if stream.test.read or _TEST in self._shown:
            self.violations.append(f"experience {experience.index + 1} looks at test images")

    def _see(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._shown |= {self._known[key] for image in inputs[0] if (key := _key_of(image)) in self._known}


def training(seen: ImagesSeen) -> str:
    """Claim: an experience uses its own training images, and no others."""
    if seen.violations:
        raise Broken(
            f"{seen.violations[0]}: use only the images that the hooks receive, and keep none for later "
            "experiences"
        )
    return f"{seen.read} images read, each in its own experience; the backbone saw no others"


def prediction(run: Run) -> str:
    """Claim: logits depend only on the image, not on its batch, its place, its label or its experience."""
    _require_only_images(run)
    images, labels = run.stream.probe()
    together = run.logits(images)
    expected = (len(images), run.experiences[-1].num_classes_seen)
    if tuple(together.shape) != expected:
        raise Broken(
            f"logits of {expected[0]} images have the shape {tuple(together.shape)} instead of {expected}: "
            "return one column for each class seen"
        )
    in_reverse = run.logits(images.flip(0)).flip(0)
    one_by_one = torch.cat([run.logits(image[None]) for image in images])
    by_experience = torch.cat([run.logits(images[mask]) for mask in _masks(run, labels)])
    for batch, logits in (
        ("in reverse order", in_reverse),
        ("in a batch of its own", one_by_one),
        ("in a batch of its experience", by_experience),
    ):
        _require_equal(f"an image gets other logits {batch} than among all images", logits, together)
    true, wrong = run.tested(images, labels), run.tested(images, labels.flip(0))
    _require_equal("test_step gives other logits if the labels are wrong", true, wrong)
    return f"{len(images)} images: all at once, in reverse, one by one, by experience, with wrong labels"


def _require_only_images(run: Run) -> None:
    parameters = list(inspect.signature(run.strategy.forward).parameters.values())
    if len(parameters) != 1:
        names = ", ".join(str(parameter) for parameter in parameters)
        raise Broken(f"forward takes ({names}): let it take images and nothing else")


def _masks(run: Run, labels: Tensor) -> list[Tensor]:
    return [(labels >= e.classes.start) & (labels < e.classes.stop) for e in run.experiences]


def _require_equal(otherwise: str, one: Tensor, other: Tensor) -> None:
    change = float((one - other).abs().max())
    if not change <= _TOLERANCE * max(1.0, float(other.abs().max())):
        raise Broken(
            f"{otherwise}, by {change:.1e}: compute the logits of each image from that image, in evaluation "
            "mode"
        )


def _key(image: Tensor) -> bytes:
    return image.contiguous().numpy().tobytes()


def _key_of(image: Tensor) -> bytes:
    """Return the pixels of an image in [0, 1] as they are stored."""
    return _key((image.detach().float().cpu() * 255).round().clamp(0, 255).to(torch.uint8))
