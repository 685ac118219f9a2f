"""What one pass over the training images of an experience can measure.

A pass is expensive and its statistics are cheap, so :func:`measure` serves any number of them with one pass.
Before a mean is taken, sums go over all processes of a run, so each may see a part of the images, of a batch
even none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from cl_bench.network.adapters import AdaptedLinear
from cl_bench.processes.ranks import OfThisRank, total

NOTHING_HEARD = "A layer has seen no token: run images through the backbone while the statistic listens."


class Statistic:
    """What a pass adds up. A subclass listens to layers, takes in features and labels, or both."""

    def listening(self) -> AbstractContextManager[object]:
        """Hear the inputs of layers as long as the context is open."""
        return nullcontext()

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Take in the features (B, d) and labels (B,) of one batch."""


class InputStatistic(OfThisRank, Statistic):
    """What is added up of the inputs of layers of one width, over all tokens.

    Within :func:`measure` it listens by itself, and around a training step within :meth:`listening`. As an
    attribute of a strategy, sums that are buffers are in every checkpoint until :meth:`clear` frees them.

    Args:
        layers: Layers with one number of inputs, ``d``.
        every: Take in every so many forward passes, the first among them.

    Attributes:
        as_multiplied: Whether tokens are taken in as autocast rounds them before the layers multiply them.

    Raises:
        ValueError: If the layers differ in their number of inputs.
    """

    as_multiplied = False

    def __init__(self, layers: Sequence[AdaptedLinear | nn.Linear], every: int = 1) -> None:
        super().__init__()
        widths = sorted({layer.weight.shape[1] for layer in layers})
        if len(widths) != 1:
            raise ValueError(
                f"Layers of {' and '.join(map(str, widths)) or 'no'} inputs share no statistic: "
                "give layers of one width, and others to a statistic of their own."
            )
        self.every = every
        self.width = widths[0]
        self.layers = tuple(layers)  # in a tuple, they do not become a part of this module
        self._passes = [0] * len(layers)

    def take(self, index: int, tokens: Tensor) -> None:
        """Take in the tokens (N, d) that layer ``index`` was given."""
        raise NotImplementedError

    def clear(self) -> None:
        """Forget every token, and free the sums."""
        self._passes = [0] * len(self.layers)

    def get_extra_state(self) -> dict[str, list[int]]:
        """Return how many passes each layer has heard: which are taken in depends on it."""
        return {"passes": list(self._passes)}

    def set_extra_state(self, state: dict[str, list[int]]) -> None:
        """Go on counting passes from ``state``."""
        self._passes = list(state["passes"])

    def hold(self, shares: Sequence[Mapping[str, Tensor]]) -> None:
        """Hold what processes had heard of which these are the ``shares``, as many passes as before."""
        passes = self._passes
        self.clear()
        self._passes = passes
        for share in shares:
            self.include(share)

    def include(self, share: Mapping[str, Tensor]) -> None:
        """Add the buffers of another statistic of this kind; where nothing was heard, they are its own."""
        raise NotImplementedError

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear every input of the layers as long as the context is open."""
        handles = [
            layer.register_forward_pre_hook(partial(self._hear, index))
            for index, layer in enumerate(self.layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _hear(self, index: int, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._passes[index] += 1
        if (self._passes[index] - 1) % self.every:
            return
        tokens = inputs[0].detach().flatten(0, -2)
        kind = tokens.device.type
        if self.as_multiplied and torch.is_autocast_enabled(kind):
            tokens = tokens.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            self.take(index, tokens)


@torch.no_grad()
def measure(
    features: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], *statistics: Statistic
) -> None:
    """Send every batch through ``features`` once, and let every statistic take from it what it needs.

    Where inputs of layers are all that is needed, the first batch shows how often these are called, and later
    ones go as far as the last call and no further.

    Args:
        features: Maps images (B, 3, H, W) to features (B, d): a backbone.
        batches: Images and labels (B,).
        statistics: What to measure; each is asked for its mean afterwards.

    >>> from cl_bench.measure.means import ClassMeans
    >>> from cl_bench.measure.moments import SecondMoments
    >>> layer = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.ones_(layer.weight)
    >>> means, moments = ClassMeans(range(2, 4)), SecondMoments([layer])
    >>> batches = [(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([2, 2, 3]))]
    >>> measure(layer, batches, means, moments)
    >>> means.mean().flatten(), moments.mean().flatten()
    (tensor([2., 5.]), tensor([11.6667], dtype=torch.float64))
    """
    with ExitStack() as stack:
        for statistic in statistics:
            stack.enter_context(statistic.listening())
        if all(map(_needs_inputs_alone, statistics)):
            layers = {layer for statistic in statistics for layer in statistic.layers}  # type: ignore[attr-defined]
            features = stack.enter_context(_as_far_as(layers, features))
        for images, labels in batches:
            found = features(images)
            for statistic in statistics:
                statistic.add(found, labels)


class _AllHeard(Exception):
    """All layers that somebody listens to have been given their inputs."""


def _needs_inputs_alone(statistic: Statistic) -> bool:
    return isinstance(statistic, InputStatistic) and type(statistic).add is Statistic.add


@contextmanager
def _as_far_as(
    layers: Collection[nn.Module], features: Callable[[Tensor], Tensor]
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give what sends images through ``features`` until ``layers`` were called as often as the first time.

    Whoever listens to these layers does so already, as hooks are called in the order in which they came.
    """
    calls, expected = 0, -1

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == expected:
            raise _AllHeard

    def send(images: Tensor) -> Tensor:
        nonlocal calls, expected
        calls = 0
        try:
            found = features(images)
        except _AllHeard:
            return images.new_empty(0)
        expected = calls
        return found

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(count).remove)
        yield send


def tokens_heard(tokens: Tensor) -> Tensor:
    """Return the numbers of tokens (L,) over all processes."""
    counts = total(tokens)
    if not bool(counts.all()):
        raise ValueError(NOTHING_HEARD)
    return counts
