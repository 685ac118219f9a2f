"""Second moments of the inputs of layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from cl_bench.measure.passes import NOTHING_RECORDED, InputStatistic, measure, tokens_recorded
from cl_bench.network.adapters import AdaptedLinear
from cl_bench.network.heads import FeatureMap
from cl_bench.processes.ranks import total

_STRIPS = 4  # of a symmetric product; more would be narrow and save little
_ROUNDED_STRIPS = 2  # if numbers are rounded once more for every strip


class SecondMoments(InputStatistic):
    """The uncentred second moment ``X^T X / N`` (d, d) of the inputs of each layer, over all N tokens.

    Queries, keys and values share one fused layer, hence one statistic. A batch costs one product of its
    flattened tokens with themselves for each layer, on the device; most of the symmetric half is left out.

    Products are taken in float64 by default, and always summed in float64, because eigenvalues are
    the squares of what the tokens hold: in a small ViT trained on natural images those of one block spread
    over nine orders of magnitude. With float32 products, the weakest keep no correct digit; with float32 sums
    as well, they may become negative. Methods that divide by old energy need them. Rules that count
    directions up to an energy do not: fractions of energy differ by 1e-8 between the two, by 1e-6 with inputs
    rounded to TF32, and every count was the same. On a CPU, a forward pass takes 11 % longer, 5 % with
    float32. GPUs made for graphics have little float64: choose float32 there if only energies matter.

    Under autocast to bfloat16, float32 records tokens rounded as the layers multiply them. Products of these
    are exact in float32, and a CPU with instructions for them is more than twice as fast. With a small ViT on
    1,000 natural images, fractions of energy moved by 7e-6 at most, and one count of 36 by one direction.

    Args:
        layers: Layers with one number of inputs, ``d``.
        every: Record every so many forward passes, the first included.
        dtype: Type of the product of one batch.

    Attributes:
        sums: ``X^T X`` of each layer so far, (L, d, d) in float64, empty before the first token. Only
            entries on or above the diagonal count.
        tokens: Number of tokens that each layer has seen, (L,).

    Raises:
        ValueError: If the layers differ in their number of inputs.

    >>> layer = nn.Linear(2, 3)
    >>> moments = SecondMoments([layer])
    >>> with moments.recording():
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
            ValueError: If no token was recorded.
        """
        tokens = tokens_recorded(self.tokens)
        return total(self.products()) / tokens[:, None, None]

    def products(self) -> Tensor:
        """Return ``X^T X`` of each layer so far, (L, d, d) in float64, on this process only."""
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


class TokenAverages(InputStatistic):
    """The mean over batches of the token at each place of a batch, whatever image it belongs to.

    Batches of another size than the first are left out. The released code of KeepLoRA,
    https://arxiv.org/abs/2601.19659, decomposes this instead of the tokens themselves: directions in which
    tokens vary from batch to batch are averaged away.

    >>> layer = nn.Linear(1, 1)
    >>> averages = TokenAverages([layer])
    >>> with averages.recording():
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
            raise ValueError(NOTHING_RECORDED)
        averages = torch.stack([self._sums[index] / self._batches for index in range(len(self.layers))])
        return total(averages.mT @ averages) / self._places


def second_moments(
    features: FeatureMap,
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


@contextmanager
def _rounded_products() -> Iterator[None]:
    """Let a CPU multiply float32 by its instructions for bfloat16, whose sums are float32.

    Products of numbers that bfloat16 can hold are exact; other numbers would be rounded.
    """
    settings = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9; older ones take longer
    before = getattr(settings, "fp32_precision", None)
    if settings is None or before is None:
        yield
        return
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
