"""What one pass over the training images of an experience can measure.

A pass is expensive and its statistics are cheap, so :func:`measure` serves any number of them with one pass.
Before a mean is taken, sums go over all processes of a run, so each may see a part of the images, of a batch
even none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cl_bench.maths.subspace import GPM
from cl_bench.network.adapters import AdaptedLinear
from cl_bench.processes.ranks import OfThisRank, total

_STRIPS = 4  # of a symmetric product; more leave out little else, and each would be narrow
_ROUNDED_STRIPS = 2  # where numbers are rounded once more for every strip
_NOTHING_HEARD = "A layer has seen no token: run images through the backbone while the statistic listens."


class Statistic:
    """What a pass adds up. A subclass listens to layers, takes in features and labels, or both."""

    def listening(self) -> AbstractContextManager[object]:
        """Hear the inputs of layers as long as the context is open."""
        return nullcontext()

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Take in the features (B, d) and labels (B,) of one batch."""


class ClassMeans(Statistic):
    """The mean feature of each class, from sums kept in float64.

    Args:
        classes: Positions of the classes to measure; every label lies among them.
    """

    def __init__(self, classes: range) -> None:
        self.classes = classes
        self._sums: Tensor | None = None
        self._counts: Tensor | None = None

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Take in the features (B, d) and labels (B,) of one batch."""
        found = features.detach().double()
        if self._sums is None or self._counts is None:
            self._sums = found.new_zeros(len(self.classes), found.shape[1])
            self._counts = found.new_zeros(len(self.classes))
        self._sums.index_add_(0, labels - self.classes.start, found)
        self._counts += torch.bincount(labels - self.classes.start, minlength=len(self.classes))

    def mean(self) -> Tensor:
        """Return the means (len(classes), d), in float32.

        Raises:
            ValueError: If a class has no image.
        """
        if self._sums is not None and self._counts is not None:
            sums, counts = total(self._sums), total(self._counts)
            if bool(counts.all()):
                return (sums / counts[:, None]).float()
        raise ValueError(
            f"A class among positions {self.classes.start} to {self.classes.stop - 1} has no training image: "
            "add images, or leave the class out."
        )


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


class SecondMoments(InputStatistic):
    """The uncentred second moment ``X^T X / N`` (d, d) of the inputs of each layer, over all N tokens.

    Queries, keys and values share one fused layer, hence one statistic. A batch costs one product of its
    flattened tokens with themselves for each layer, on the device, less most of what symmetry gives.

    Products are taken in float64 unless told otherwise, and always summed in float64, because eigenvalues are
    the squares of what the tokens hold: in a small ViT trained on natural images those of one block spread
    over nine orders of magnitude. From float32 products, the weakest keep no correct digit; summed in float32
    too, they may come out negative. Methods that divide by old energy need them. Rules that count directions
    up to an energy do not: fractions of energy differ by 1e-8 between the two, by 1e-6 with inputs rounded to
    TF32, and every count was the same. On a CPU, a forward pass becomes dearer by 11 %, with float32 by 5 %.
    GPUs made for graphics have little float64: ask for float32 there if only energies matter.

    Under autocast to bfloat16, float32 takes in tokens rounded as the layers multiply them. Products of these
    are exact in float32, and a CPU with instructions for them is more than twice as fast. Of a small ViT on
    1,000 natural images, fractions of energy moved by 7e-6 at most, and one count of 36 by one direction.

    Args:
        layers: Layers with one number of inputs, ``d``.
        every: Take in every so many forward passes, the first among them.
        dtype: Type of the product of one batch.

    Attributes:
        sums: ``X^T X`` of each layer so far, (L, d, d) in float64, empty before the first token. Only what is
            on or above the diagonal counts.
        tokens: Number of tokens that each layer has seen, (L,).

    Raises:
        ValueError: If the layers differ in their number of inputs.

    >>> layer = nn.Linear(2, 3)
    >>> moments = SecondMoments([layer])
    >>> with moments.listening():
    ...     _ = layer(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    >>> moments.mean()
    tensor([[[5., 0.],
             [0., 0.]]], dtype=torch.float64)
    """

    sums: Tensor
    tokens: Tensor

    def __init__(
        self,
        layers: Sequence[AdaptedLinear | nn.Linear],
        every: int = 1,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(layers, every)
        self.dtype = dtype
        self.as_multiplied = dtype == torch.float32
        self.clear()

    def clear(self) -> None:
        """Forget every token, and free the sums."""
        super().clear()
        device = self.layers[0].weight.device
        self.register_buffer("sums", torch.empty(0, dtype=torch.float64, device=device))
        self.register_buffer("tokens", torch.zeros(len(self.layers), dtype=torch.int64, device=device))

    def mean(self) -> Tensor:
        """Return the second moments (L, d, d), in float64.

        Raises:
            ValueError: If no token has been heard.
        """
        tokens = _heard(self.tokens)
        return total(self.products()) / tokens[:, None, None]

    def products(self) -> Tensor:
        """Return ``X^T X`` of each layer so far, (L, d, d) in float64, of this process alone."""
        return self.sums.triu() + self.sums.triu(1).mT

    def take(self, index: int, tokens: Tensor) -> None:
        """Add the product of tokens (N, d) with themselves, strip by strip from the diagonal on."""
        if not self.sums.numel():
            shape = (len(self.layers), self.width, self.width)
            self.sums = tokens.new_zeros(shape, dtype=torch.float64)
            self.tokens = self.tokens.to(tokens.device)
        rounded = tokens.dtype == torch.bfloat16
        strip = math.ceil(self.width / (_ROUNDED_STRIPS if rounded else _STRIPS))
        with _rounded_products() if rounded else nullcontext():
            tokens = tokens.to(self.dtype)
            for start in range(0, self.width, strip):
                rows = slice(start, start + strip)
                self.sums[index, rows, start:] += tokens[:, rows].T @ tokens[:, start:]
        self.tokens[index] += len(tokens)

    def include(self, share: Mapping[str, Tensor]) -> None:
        """Add sums and numbers of tokens."""
        self.sums = self.sums + share["sums"] if bool(self.tokens.any()) else share["sums"]
        self.tokens = self.tokens + share["tokens"]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # Sums are saved as empty or as full; what is here may be the other.
        saved = state_dict.get(f"{prefix}sums")
        if saved is not None:
            self.sums = torch.empty_like(saved, dtype=torch.float64, device=self.sums.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class InputSketch(InputStatistic):
    """A sketch of the inputs of each layer outside of what a memory protects, in ``rows`` vectors.

    Between the steps of training it holds (rows, d) numbers for each layer instead of (d, d). A batch is
    stacked below the sketch, and the singular values of both together are shrunk until no more than ``rows``
    are left. What shrinking took away is known as a whole, and put back evenly: energies inside and outside
    of the memory are exact, directions beyond those of the sketch are not. A memory takes no more than these.
    Of several processes each keeps a sketch of its own images, and what stands for all is their sum: energies
    are those of one process, directions need not be.

    Source: frequent directions, https://arxiv.org/abs/1501.01711.

    Args:
        layers: Layers with one number of inputs, ``d``.
        memory: What is protected in each of them.
        rows: Directions that are kept; never more than d.
        every: Take in every so many forward passes, the first among them.
        most_tokens: Tokens of a batch that are taken in, spread over images and places alike.

    Attributes:
        sketch: ``Y`` (L, rows, d), so that ``Y^T Y`` is nearly ``P X^T X P`` of the inputs ``X``.
        inside: Energy of the inputs in the protected directions, (L,) in float64.
        outside: Their energy elsewhere, (L,) in float64.
        tokens: Number of tokens that each layer has taken in, (L,).

    Raises:
        ValueError: If the layers differ in their number of inputs, the sketch has no row, or the memory
            measures the energy of the covariance, of which a sketch does not know the whole.

    >>> layer = nn.Linear(2, 3)
    >>> inputs = InputSketch([layer], GPM(num_layers=1, dim=2), rows=1)
    >>> with inputs.listening():
    ...     _ = layer(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    >>> inputs.mean().round(decimals=4)
    tensor([[[5., 0.],
             [0., 0.]]], dtype=torch.float64)
    """

    sketch: Tensor
    inside: Tensor
    outside: Tensor
    tokens: Tensor

    def __init__(
        self,
        layers: Sequence[AdaptedLinear | nn.Linear],
        memory: GPM,
        rows: int = 64,
        every: int = 1,
        most_tokens: int = 256,
    ) -> None:
        super().__init__(layers, every)
        if rows < 1:
            raise ValueError(f"A sketch of {rows} rows holds nothing: give it at least one.")
        if memory.energy != "features":
            raise ValueError(
                "A sketch knows the energy of features as a whole and that of their covariance in part: "
                "set energy to features, or estimate exact moments."
            )
        self._memory = (memory,)  # in a tuple, it does not become a part of this module
        self.rows = min(rows, self.width)
        self.most_tokens = most_tokens
        self.clear()

    def clear(self) -> None:
        """Forget every token."""
        super().clear()
        count, device = len(self.layers), self.layers[0].weight.device
        self.register_buffer("sketch", torch.zeros(count, self.rows, self.width, device=device))
        for name in ("inside", "outside"):
            self.register_buffer(name, torch.zeros(count, dtype=torch.float64, device=device))
        self.register_buffer("tokens", torch.zeros(count, dtype=torch.int64, device=device))

    def mean(self) -> Tensor:
        """Return what stands for the second moments (L, d, d), in float64: their energies are exact.

        Raises:
            ValueError: If no token has been heard.
        """
        tokens = _heard(self.tokens)
        kept = self.sketch.double()
        found = total(kept.mT @ kept)
        inside, outside = total(self.inside), total(self.outside)
        missing = (outside - found.diagonal(dim1=-2, dim2=-1).sum(-1)).clamp(min=0)
        for index, moment in enumerate(found):
            basis = self._memory[0].basis(index).double()
            held, free = basis.shape[1], self.width - basis.shape[1]
            protected = basis @ basis.mT
            moment += protected * (inside[index] / max(held, 1))
            moment += (torch.eye(self.width).to(protected) - protected) * (missing[index] / max(free, 1))
        return found / tokens[:, None, None]

    def take(self, index: int, tokens: Tensor) -> None:
        """Take their energies, and stack what is outside of the memory below the sketch."""
        tokens = tokens[_spread(len(tokens), self.most_tokens)].float()
        rest = self._memory[0].right_residual(tokens, index)
        energy = rest.double().square().sum()
        self.inside[index] += (tokens.double().square().sum() - energy).clamp(min=0)
        self.outside[index] += energy
        self.tokens[index] += len(tokens)
        self._stack(index, rest)

    def include(self, share: Mapping[str, Tensor]) -> None:
        """Add energies, and stack the sketches."""
        if bool(self.tokens.any()):
            for index, rows in enumerate(share["sketch"]):
                self._stack(index, rows)
        else:
            self.sketch = share["sketch"].clone()
        for name in ("inside", "outside", "tokens"):
            setattr(self, name, getattr(self, name) + share[name])

    def _stack(self, index: int, rows: Tensor) -> None:
        """Stack rows (N, d) below the sketch of a layer and shrink both together."""
        stacked = torch.cat([self.sketch[index], rows]).double()
        values, vectors = torch.linalg.eigh(stacked @ stacked.mT)  # weakest first
        beyond = values[-self.rows - 1].clamp(min=0) if len(values) > self.rows else values.new_zeros(())
        values, vectors = values[-self.rows :], vectors[:, -self.rows :]
        shrunk = ((values - beyond).clamp(min=0) / values.clamp(min=torch.finfo(values.dtype).tiny)).sqrt()
        self.sketch[index] = (shrunk[:, None] * (vectors.mT @ stacked)).float()


class TokenAverages(InputStatistic):
    """The mean over batches of the token at each place of a batch, whatever image it belongs to.

    Batches of another size than the first are left out. This is what the released code of KeepLoRA,
    https://arxiv.org/abs/2601.19659, decomposes in place of the tokens themselves: directions in which tokens
    vary from batch to batch are averaged away.

    >>> layer = nn.Linear(1, 1)
    >>> averages = TokenAverages([layer])
    >>> with averages.listening():
    ...     _ = layer(torch.tensor([[1.0], [5.0]])), layer(torch.tensor([[1.0], [1.0]]))
    >>> averages.second_moments()
    tensor([[[5.]]], dtype=torch.float64)
    """

    def __init__(self, layers: Sequence[AdaptedLinear | nn.Linear]) -> None:
        super().__init__(layers)
        self.clear()

    def clear(self) -> None:
        """Forget every token."""
        super().clear()
        self._sums: dict[int, Tensor] = {}
        self._batches = self._places = 0  # of the first batch, on all processes
        self._whole = True  # whether the batch at hand has as many

    def take(self, index: int, tokens: Tensor) -> None:
        """Add the tokens (N, d) of a batch to those of the others, place by place."""
        if index == 0:
            places = int(total(torch.tensor(len(tokens), device=tokens.device)))
            self._places = self._places or places
            self._whole = places == self._places
            self._batches += self._whole
        if self._whole:
            summed = self._sums.setdefault(index, torch.zeros_like(tokens, dtype=torch.float64))
            summed += tokens

    def second_moments(self) -> Tensor:
        """Return the uncentred second moment of the averages, (L, d, d) in float64."""
        if not self._batches:
            raise ValueError(_NOTHING_HEARD)
        averages = torch.stack([self._sums[index] / self._batches for index in range(len(self.layers))])
        return total(averages.mT @ averages) / self._places


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


def class_means(
    features: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], classes: range
) -> Tensor:
    """Return the mean feature of each class, (len(classes), d), in float32.

    Sums are kept in float64, so the means do not depend on the batch size beyond rounding.

    Args:
        features: Maps images (B, 3, H, W) to features (B, d).
        batches: Images and labels (B,); a label is a position in the class order and lies in ``classes``.
        classes: Positions of the classes to measure.

    Raises:
        ValueError: If a class has no image.

    >>> batches = [(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([2, 2, 3]))]
    >>> class_means(lambda images: images, batches, range(2, 4)).flatten()
    tensor([2., 5.])
    """
    means = ClassMeans(classes)
    measure(features, batches, means)
    return means.mean()


def second_moments(
    features: Callable[[Tensor], Tensor],
    layers: Sequence[AdaptedLinear | nn.Linear],
    batches: Iterable[tuple[Tensor, Tensor]],
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return the uncentred second moment of the inputs of each layer, (L, d, d) in float64.

    It is a mean over all tokens of all images; see :class:`SecondMoments`.

    Args:
        features: Maps images (B, 3, H, W) to features (B, d), by way of ``layers``.
        layers: Layers with one number of inputs, ``d``.
        batches: Images and labels (B,).
        dtype: Type of the product of one batch.

    Raises:
        ValueError: If the layers differ in their number of inputs or no image reaches them.
    """
    moments = SecondMoments(layers, dtype=dtype)
    measure(features, batches, moments)
    return moments.mean()


def full_weight_gradients(
    loss: Callable[[Tensor, Tensor], Tensor],
    layers: Sequence[AdaptedLinear | nn.Linear],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> list[Tensor]:
    """Return the gradient (m, n) of the mean loss over all images for the weight of each layer.

    Nothing moves: the weights require a gradient during the pass alone, and no ``grad`` is touched. Batches
    count by their images, so the result does not depend on how these are split.

    Source: the first-step gradient of KeepLoRA, https://arxiv.org/abs/2601.19659.

    Args:
        loss: Maps images (B, 3, H, W) and labels (B,) to their mean loss, a scalar.
        layers: Layers that the loss goes through; each weight counts with whatever adapters add to it.
        batches: Images and labels.

    Raises:
        ValueError: If there is no batch.

    >>> layer = nn.Linear(2, 1)
    >>> batches = [(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 0]))]
    >>> full_weight_gradients(lambda images, labels: layer(images).mean(), [layer], batches)
    [tensor([[2., 0.]])]
    """
    weights = [layer.weight for layer in layers]
    sums = [torch.zeros_like(weight) for weight in weights]
    count = torch.zeros((), dtype=torch.int64, device=weights[0].device)
    with _requiring_gradients(weights):
        for images, labels in batches:
            # Until its context ends, autocast keeps a rounded copy of each weight that requires a gradient;
            # this pass may be the second in that context, with other values in the weights.
            torch.clear_autocast_cache()
            for summed, gradient in zip(
                sums, torch.autograd.grad(loss(images, labels) * len(labels), weights), strict=True
            ):
                summed += gradient
            count += len(labels)
    count = total(count)
    if not count:
        raise ValueError("There is no batch to take a gradient of: give at least one.")
    return [total(summed) / count for summed in sums]


@contextmanager
def _requiring_gradients(weights: Sequence[Tensor]) -> Iterator[None]:
    """Ask for gradients of ``weights``, even where none are taken; afterwards all is as before."""
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)


def _spread(count: int, most: int) -> list[int]:
    """Return at most ``most`` of ``count`` places, far apart, and in step with no period of them.

    The places of a token repeat from image to image: a stride that divided their number would pick the same
    ones from every image. This one shares no factor with the count, near the golden section of it.
    """
    if count <= most:
        return list(range(count))
    step = round(count * 0.618)
    while math.gcd(step, count) != 1:
        step += 1
    return [place * step % count for place in range(most)]


@contextmanager
def _rounded_products() -> Iterator[None]:
    """Let a CPU multiply float32 by its instructions for bfloat16, whose sums are float32.

    Of numbers that bfloat16 holds the products are exact; others would be rounded.
    """
    settings = getattr(torch.backends.mkldnn, "matmul", None)  # from torch 2.9 on; before, it takes longer
    before = getattr(settings, "fp32_precision", None)
    if settings is None or before is None:
        yield
        return
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _heard(tokens: Tensor) -> Tensor:
    """Return the numbers of tokens (L,) over all processes."""
    counts = total(tokens)
    if not bool(counts.all()):
        raise ValueError(_NOTHING_HEARD)
    return counts
