"""The claim that a strategy learns from the training images of the experience at hand, and from no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cl_bench.check.subject import Run
from cl_bench.check.verdict import Broken
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
