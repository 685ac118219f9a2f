"""Aligning the gradients of two halves of a batch, by taking one where a step on the other would lead.

To first order this makes the inner product of the two gradients larger: what is learnt for some classes then
serves the others, too.

Source: gradient-aligned optimisation in LoDA, https://arxiv.org/abs/2603.00191.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cl_bench.processes.ranks import from_first, gathered

Batch = tuple[Tensor, Tensor]


def class_halves(images: Tensor, labels: Tensor) -> tuple[Batch, Batch] | None:
    """Split a batch, images (B, …) and labels (B,), by a random half of its classes.

    Draws from torch's CPU generator. None if the batch has a single class. Of several processes all split by
    the same half of the classes that the batch has on any, so a part may be empty on one.

    >>> first, second = class_halves(torch.arange(4.0), torch.tensor([7, 8, 8, 7]))
    >>> sorted((first[1].tolist(), second[1].tolist()))
    [[7, 7], [8, 8]]
    """
    classes = gathered(labels).unique()
    if len(classes) < 2:
        return None
    places = from_first(torch.randperm(len(classes)), classes.device)
    chosen = classes[places[: len(classes) // 2].to(classes.device)]
    first = torch.isin(labels, chosen)
    return (images[first], labels[first]), (images[~first], labels[~first])


@contextmanager
def looking_ahead(tensors: Sequence[Tensor], gradients: Sequence[Tensor], length: float) -> Iterator[None]:
    """Move every tensor by ``length`` down its gradient inside, and put it back bit for bit.

    A tensor whose gradient is zero stays.

    >>> weight = torch.tensor([1.0, 1.0])
    >>> with looking_ahead([weight], [torch.tensor([3.0, 4.0])], length=1.0):
    ...     print(weight)
    tensor([0.4000, 0.2000])
    >>> weight
    tensor([1., 1.])
    """
    before = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.sub_(length * gradient / (gradient.norm() + 1e-12))
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)
