"""What one pass over the training images of an experience can measure.

A pass is expensive and its statistics are cheap, so :func:`measure` serves any number of them with one pass.
Means are taken after summing over all processes of a run, so each process may see a part of the images, and
even no image of a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from cl_bench.network.adapters import AdaptedLinear
from cl_bench.network.heads import FeatureMap, Features, pooled
from cl_bench.processes.ranks import OfThisRank, total

NOTHING_RECORDED = "A layer has seen no token: run images through the backbone while the statistic records."


class Statistic:
    """What a pass sums up. A subclass records inputs of layers, features and labels, or both."""

    def recording(self) -> AbstractContextManager[object]:
        """Record the inputs of layers while the context is open."""
        return nullcontext()

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add the features (B, d) and labels (B,) of one batch."""


class InputStatistic(OfThisRank, Statistic):
    """A sum over the inputs of layers of one width, over all tokens.

    :func:`measure` records automatically; a training step records inside :meth:`recording_after`. The buffers
    of a statistic that is an attribute of a strategy are part of every checkpoint until :meth:`clear` frees
    them.

    Args:
        layers: Layers with one number of inputs, ``d``.
        every: Record every so many forward passes, the first included.

    Attributes:
        as_multiplied: Whether tokens are rounded to autocast's type first, as the layers see them.

    Raises:
        ValueError: If the layers differ in their number of inputs.
    """

    as_multiplied = False

    def __init__(self, layers: Sequence[AdaptedLinear | nn.Linear], every: int = 1) -> None:
        super().__init__()
        widths = sorted({layer.weight.shape[1] for layer in layers})
        if len(widths) != 1:
            raise ValueError(
                f"Layers of {' and '.join(map(str, widths)) or 'no'} inputs cannot share a statistic: "
                "give layers of one width, and others to a statistic of their own."
            )
        self.every = every
        self.width = widths[0]
        self.layers = tuple(layers)  # in a tuple, they do not become a part of this module
        self._passes = [0] * len(layers)

    def take(self, index: int, tokens: Tensor) -> None:
        """Add the tokens (N, d) that layer ``index`` received."""
        raise NotImplementedError

    def clear(self) -> None:
        """Forget every token, and free the sums."""
        self._passes = [0] * len(self.layers)

    def get_extra_state(self) -> dict[str, list[int]]:
        """Return how many passes each layer has recorded, which decides which ones count."""
        return {"passes": list(self._passes)}

    def set_extra_state(self, state: dict[str, list[int]]) -> None:
        """Continue to count passes from ``state``."""
        self._passes = list(state["passes"])

    def hold(self, shares: Sequence[Mapping[str, Tensor]]) -> None:
        """Hold the sum of the ``shares`` of earlier processes; the count of passes stays."""
        passes = self._passes
        self.clear()
        self._passes = passes
        for share in shares:
            self.include(share)

    def include(self, share: Mapping[str, Tensor]) -> None:
        """Add the buffers of another statistic of this kind, or take them over if this one is empty."""
        raise NotImplementedError

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record every input of the layers while the context is open."""
        handles = [
            layer.register_forward_pre_hook(partial(self._record, index))
            for index, layer in enumerate(self.layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def recording_after(self) -> Iterator[None]:
        """Record, when the context closes, what the adapted layers multiplied in their last call inside it.

        Compiled code calls no hook, and this needs none.
        """
        layers = [layer for layer in self.layers if isinstance(layer, AdaptedLinear)]
        assert len(layers) == len(self.layers)
        for layer in layers:
            layer.keeps_inputs = True
        try:
            yield
            for index, layer in enumerate(layers):
                if layer.inputs is not None:
                    self._record(index, layer, (layer.inputs,))
        finally:
            for layer in layers:
                layer.keeps_inputs, layer.inputs = False, None

    @torch.no_grad()
    def _record(self, index: int, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
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
def measure(features: FeatureMap, batches: Iterable[tuple[Tensor, Tensor]], *statistics: Statistic) -> None:
    """Send every batch through ``features`` once, and add it to every statistic.

    If the statistics need only inputs of layers, the first batch shows how often these layers are called, and
    later batches stop at the last call.

    Args:
        features: Maps images (B, 3, H, W) to features (B, d): a backbone.
        batches: Images and labels (B,).
        statistics: What to measure; read their means afterwards.

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
            stack.enter_context(statistic.recording())
        if all(map(_needs_only_inputs, statistics)):
            layers = {layer for statistic in statistics for layer in statistic.layers}  # type: ignore[attr-defined]
            features = stack.enter_context(_as_far_as(layers, features))
        for images, labels in batches:
            found = pooled(features(images))
            for statistic in statistics:
                statistic.add(found, labels)


class _AllRecorded(Exception):
    """All recorded layers have received their inputs."""


def _needs_only_inputs(statistic: Statistic) -> bool:
    return isinstance(statistic, InputStatistic) and type(statistic).add is Statistic.add


@contextmanager
def _as_far_as(layers: Collection[nn.Module], features: FeatureMap) -> Iterator[FeatureMap]:
    """Yield a map that sends images through ``features`` until ``layers`` were called as often as at first.

    The statistics have registered their hooks already, and torch calls hooks in the order of registration.
    """
    calls, expected = 0, -1

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == expected:
            raise _AllRecorded

    def send(images: Tensor) -> Tensor | Features:
        nonlocal calls, expected
        calls = 0
        try:
            found = features(images)
        except _AllRecorded:
            return images.new_empty(0)
        expected = calls
        return found

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(count).remove)
        yield send


def tokens_recorded(tokens: Tensor) -> Tensor:
    """Return the numbers of tokens (L,) over all processes.

    Raises:
        ValueError: If a layer has recorded none.
    """
    counts = total(tokens)
    if not bool(counts.all()):
        raise ValueError(NOTHING_RECORDED)
    return counts
