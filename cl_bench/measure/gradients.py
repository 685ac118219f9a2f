"""Gradients of whole weights, and their squares, averaged over the images of a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cl_bench.network.adapters import AdaptedLinear
from cl_bench.processes.ranks import total, totals

_NO_BATCH = "There is no batch to take a gradient of: give at least one."


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
    sums = [torch.zeros_like(layer.weight) for layer in layers]
    count = torch.zeros((), dtype=torch.int64, device=sums[0].device)
    for gradients, images in _of_batches(loss, layers, batches):
        for summed, gradient in zip(sums, gradients, strict=True):
            summed += gradient
        count += images
    count = total(count)
    if not count:
        raise ValueError(_NO_BATCH)
    return [total(summed) / count for summed in sums]


def squared_weight_gradients(
    loss: Callable[[Tensor, Tensor], Tensor],
    layers: Sequence[AdaptedLinear | nn.Linear],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> list[Tensor]:
    """Return the mean squared gradient (m, n) of the loss of a batch for the weight of each layer.

    It is the diagonal of an empirical Fisher matrix of batches: the gradient of the mean loss of a batch,
    over all processes, is squared entry by entry, and each batch counts by its images. With batches of one
    image it is that of images; larger batches make it smaller. Nothing moves, and no ``grad`` is touched.

    Source: the released code of EWC-LoRA, https://github.com/yaoyz96/low-rank-cl.

    Args:
        loss: Maps images (B, 3, H, W) and labels (B,) to their mean loss, a scalar.
        layers: Layers that the loss goes through; each weight counts with whatever adapters add to it.
        batches: Images and labels.

    Raises:
        ValueError: If there is no batch.

    >>> layer = nn.Linear(2, 1)
    >>> label = torch.tensor([0])
    >>> batches = [(torch.tensor([[1.0, 0.0]]), label), (torch.tensor([[3.0, 0.0]]), label)]
    >>> squared_weight_gradients(lambda images, labels: layer(images).mean(), [layer], batches)
    [tensor([[5., 0.]])]
    """
    sums = [torch.zeros_like(layer.weight) for layer in layers]
    count = torch.zeros((), dtype=torch.int64, device=sums[0].device)
    for gradients, images in _of_batches(loss, layers, batches):
        *of_batch, whole = totals([*gradients, images.to(sums[0].dtype)])
        for summed, gradient in zip(sums, of_batch, strict=True):
            summed += gradient.square() / whole  # the square of a mean, times its images
        count += whole.long()
    if not count:
        raise ValueError(_NO_BATCH)
    return [summed / count for summed in sums]


def _of_batches(
    loss: Callable[[Tensor, Tensor], Tensor],
    layers: Sequence[AdaptedLinear | nn.Linear],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> Iterator[tuple[Sequence[Tensor], Tensor]]:
    """Yield each batch's gradients (m, n), summed over this process's images, and their number."""
    weights = [layer.weight for layer in layers]
    with _requiring_gradients(weights):
        for images, labels in batches:
            # Until its context ends, autocast keeps a rounded copy of each weight that requires a gradient.
            # This pass may be the second in that context, with other values in the weights.
            torch.clear_autocast_cache()
            found = torch.autograd.grad(loss(images, labels) * len(labels), weights)
            yield found, torch.tensor(len(labels), device=weights[0].device)


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
