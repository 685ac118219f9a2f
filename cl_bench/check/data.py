"""What a strategy may see and keep of images: those of its experience, and at test time one at a time."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cl_bench.check.leftovers import Kept
from cl_bench.check.stream import CLASSES_PER_EXPERIENCE
from cl_bench.check.subject import Broken, Run, copied_state, differing, some
from cl_bench.data.experience import Experience

_ROUNDING = 1e-5  # of a logit or a pixel: products over another batch size round in another order
_TEST = -1  # in place of the index of a training image
_FEW_BYTES = 16  # two numbers


class ImagesSeen:
    """The images that a strategy read while it trained, and those that it sent through the backbone.

    Args:
        run: The strategy and its stream.

    Attributes:
        read: Number of training images read, counted once in each experience.
        shown_again: Number of training images of older experiences that went through the backbone.
        violations: What was seen that should not have been, each in a phrase.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        stream = run.stream
        self._known = {_key(image): index for index, image in enumerate(stream.train.images)}
        self._known |= {_key(image): _TEST for image in stream.test.images}
        self._shown: set[int] = set()
        self.violations: list[str] = []
        self.read = self.shown_again = 0

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
        shown = self._shown - {_TEST}
        if self._run.strategy.promises.training_data == "images":  # which it may keep, but not read again
            old = {image for image in shown if stream.train.targets[image] < experience.classes.start}
            self.shown_again += len(old)
            shown -= old
        for what, images in (("reads", stream.train.read), ("shows the backbone", shown)):
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
    others = f"{seen.shown_again} older ones again, as declared" if seen.shown_again else "no others"
    return f"{seen.read} images read, each in its own experience; the backbone saw {others}"


def prediction(run: Run) -> str:
    """Claim: logits depend only on the image, not on its batch, its place, its label or its experience.

    Logits of one image in two batches may differ by rounding. How much that is depends on the method: a
    solved regression amplifies it. A relative change of every pixel by 1e-5 shows it.
    """
    _require_only_images(run)
    images, labels = run.stream.probe()
    before = copied_state(run.strategy)
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
    if changed := differing(before, copied_state(run.strategy)):
        raise Broken(
            f"test images change {some(changed)}: learn from training images, and write nothing at test time"
        )
    signs = torch.arange(images.numel()).view_as(images) % 2 * 2 - 1
    moved = float((run.logits(images * (1 + _ROUNDING * signs)) - together).abs().max())
    tolerance = max(_ROUNDING * max(1.0, float(together.abs().max())), moved)
    for batch, logits in (
        ("in reverse order", in_reverse),
        ("in a batch of its own", one_by_one),
        ("in a batch of its experience", by_experience),
    ):
        _require_equal(
            f"an image gets other logits {batch} than among all images", logits, together, tolerance
        )
    true, wrong = run.tested(images, labels), run.tested(images, labels.flip(0))
    _require_equal("test_step gives other logits if the labels are wrong", true, wrong, tolerance)
    later = run.tested(images, labels, batch=1)
    _require_equal("test_step gives other logits in another batch of the pass", true, later, tolerance)
    return f"{len(images)} images: all at once, in reverse, one by one, by experience, with wrong labels"


def _require_only_images(run: Run) -> None:
    parameters = list(inspect.signature(run.strategy.forward).parameters.values())
    if len(parameters) != 1:
        names = ", ".join(str(parameter) for parameter in parameters)
        raise Broken(f"forward takes ({names}): let it take images and nothing else")


def _masks(run: Run, labels: Tensor) -> list[Tensor]:
    return [(labels >= e.classes.start) & (labels < e.classes.stop) for e in run.experiences]


def _require_equal(otherwise: str, one: Tensor, other: Tensor, tolerance: float) -> None:
    change = float((one - other).abs().max())
    if not change <= tolerance:
        raise Broken(
            f"{otherwise}, by {change:.1e}: compute the logits of each image from that image, in evaluation "
            "mode"
        )


def keeping(found: Kept, seen: ImagesSeen) -> str:
    """Claim: what is kept of training images does not grow with their number, but as declared.

    A few numbers for each image are allowed. Features of images take the bytes of a feature for each, and
    whatever takes the bytes of its pixels counts as an image.
    """
    declared = found.strategy.promises.training_data
    each = found.in_memory + found.in_files
    in_files = ", ".join(["in files", *(f"such as {file}" for file in found.files[:1])])
    where = "in memory" if found.in_memory > _FEW_BYTES else in_files
    measured = f"an image leaves {max(each, 0):.0f} bytes behind after its experience"
    if declared == "none" and each > _FEW_BYTES:
        raise Broken(
            f"{measured}, {where}, and training_data is none in Promises: keep statistics of all images of "
            "a class or experience, and nothing for each image"
        )
    if declared == "features" and each > found.feature + _FEW_BYTES:
        raise Broken(
            f"{measured}, {where}, and a feature has {found.feature}: keep one feature for each image, or "
            "set training_data to images in Promises, which is what results then show"
        )
    if declared != "none" and each <= _FEW_BYTES and not seen.shown_again:
        raise Broken(
            f"{measured}, and {declared} are declared: remove training_data from Promises, since results "
            "would show that the method keeps training data"
        )
    return f"{measured}, and {'nothing is' if declared == 'none' else f'{declared} are'} declared"


def _key(image: Tensor) -> bytes:
    return image.contiguous().numpy().tobytes()


def _key_of(image: Tensor) -> bytes:
    """Return the pixels of an image in [0, 1] as they are stored."""
    return _key((image.detach().float().cpu() * 255).round().clamp(0, 255).to(torch.uint8))
