"""The draws of a pass: which image comes next, and the seed of its transform."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cl_bench.data.sources import Indices, Source
from cl_bench.data.stream import Transform
from cl_bench.data.views import View


class Draw(NamedTuple):
    """One image to load.

    Attributes:
        image: Its index in the dataset.
        seed: Seed of its transform.
    """

    image: int
    seed: int


class DrawSampler(Sampler[Draw]):
    """Draws of the images ``indices``, a function of the entropy and the epoch.

    Args:
        indices: Images of the dataset (N,).
        entropy: What identifies these draws: the seed, the experience, the pass over it.
        shuffle: Whether the order of the images changes with the epoch.
    """

    def __init__(self, indices: Indices, entropy: Sequence[int], *, shuffle: bool) -> None:
        self.indices = indices
        self.entropy = tuple(entropy)
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw for ``epoch`` from now on; Lightning calls this at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of draws in an epoch."""
        return len(self.indices)

    def __iter__(self) -> Iterator[Draw]:
        """Yield every image once."""
        # RandomState is frozen: its numbers are the same under every version of NumPy.
        bits = np.random.MT19937(np.random.SeedSequence((*self.entropy, self.epoch)))
        generator = np.random.RandomState(bits)
        seeds = generator.randint(2**63 - 1, size=len(self), dtype=np.int64)
        places = generator.permutation(len(self)) if self.shuffle else np.arange(len(self))
        for image, seed in zip(self.indices[places].tolist(), seeds[places].tolist(), strict=True):
            yield Draw(image, seed)


class DrawnImages(Dataset[tuple[Any, ...]]):
    """The images of a whole source, transformed as drawn and labelled by position in the class order.

    Args:
        source: Decoded images with original labels.
        order: Original label at each position.
        transform: What is applied to each image.
        domains: Index of each image's domain; empty to leave domains out.
    """

    def __init__(
        self, source: Source, order: Sequence[int], transform: Transform, domains: Sequence[int] = ()
    ) -> None:
        self.source = source
        self.transform = transform
        self.positions: Indices = np.argsort(order)[np.asarray(source.targets, dtype=np.int64)]
        self.domains: Indices = np.asarray(domains, dtype=np.int64)

    def __getitem__(self, draw: Draw) -> tuple[Any, ...]:
        """Return the drawn image (3, H, W), its position in the class order, and its domain if it has one.

        A view of :mod:`cl_bench.data.views` leaves its image in uint8; other transforms give floats.
        """
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw]) -> list[tuple[Any, ...]]:
        """Return the sample of each draw, and leave torch's generator as it was."""
        with _preserved_generator() as generator:
            return [self._drawn(draw, generator) for draw in draws]

    def _drawn(self, draw: Draw, generator: torch.Generator) -> tuple[Any, ...]:
        generator.manual_seed(draw.seed)
        image, _ = self.source[draw.image]
        return (self._transformed(image), *self._position_and_domain(draw))

    def below(self, stops: Sequence[int]) -> tuple[Indices, list[int]]:
        """Return the images whose positions are below the last stop, group by group, and the sizes of groups.

        Args:
            stops: Last-plus-one position of each group, rising.
        """
        group = np.searchsorted(stops, self.positions, side="right")
        sizes = np.bincount(group, minlength=len(stops))[: len(stops)].tolist()
        return np.argsort(group, kind="stable")[: sum(sizes)], sizes

    def blank(self, draw: Draw) -> tuple[Any, ...]:
        """Return the same sample with an empty image (0,), which is not loaded."""
        return (torch.empty(0), *self._position_and_domain(draw))

    def _position_and_domain(self, draw: Draw) -> tuple[int, ...]:
        domain = (int(self.domains[draw.image]),) if len(self.domains) else ()
        return (int(self.positions[draw.image]), *domain)

    def _transformed(self, image: Any) -> Tensor:
        return self.transform.pixels(image) if isinstance(self.transform, View) else self.transform(image)


@contextmanager
def _preserved_generator() -> Iterator[torch.Generator]:
    """Yield torch's CPU generator, and restore its state afterwards."""
    generator = torch.default_generator
    state = generator.get_state()
    try:
        yield generator
    finally:
        generator.set_state(state)
