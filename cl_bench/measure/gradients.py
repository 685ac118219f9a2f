"""Gradients of whole weights, averaged over the images of a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cl_bench.network.adapters import AdaptedLinear
from cl_bench.processes.ranks import total


def full_weight_gradients(
    loss: Callable[[Tensor, Tensor], Tensor],
    layers: Sequence[AdaptedLinear | nn.Linear],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> list[Tensor]:
    """Return the gradient (m, n) of the mean loss over all images for the weight of each layer.

    Nothing moves: the weights require a gradient only during the pass, and no ``grad`` is touched. Batches
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
            # Until its context ends, autocast keeps a rounded copy of each weight that requires a gradient.
            # This pass may be the second in that context, with other values in the weights.
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
    """Let ``weights`` require gradients, under ``no_grad`` too, and restore everything afterwards."""
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)
