"""The one way to restore a tensor into a module, from a checkpoint or from another process."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NoPlace(ValueError):
    """A strategy has no place for something that was saved.

    Args:
        name: Its name in the ``state_dict``.
        value: The tensor, if it is one.
    """

    def __init__(self, name: str, value: Tensor | None = None) -> None:
        shape = "" if value is None else f" with shape {tuple(value.shape)}"
        super().__init__(
            f"The strategy has no place for {name}{shape} after it was expanded: let expand make every "
            "module and parameter, and register every buffer."
        )


@torch.no_grad()
def put(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Let the parameter or buffer ``name`` of ``module`` be ``value``, bit by bit.

    The type becomes that of ``value``. A parameter stays the same object, since an optimizer may hold it. A
    buffer may change its shape, since a basis grows, and sums are empty before the first token. None removes
    a buffer, since a memory stores either a basis or its complement.

    Args:
        module: The whole model. A buffer that is replaced goes to the device of its first parameter.
        name: Name in the ``state_dict`` of ``module``.
        value: A tensor on any device, or None.

    Raises:
        NoPlace: If there is nothing of this name, or a parameter of another shape.

    >>> layer = nn.BatchNorm1d(2)
    >>> put(layer, "running_mean", torch.ones(3))
    >>> layer.running_mean
    tensor([1., 1., 1.])
    """
    path, _, leaf = name.rpartition(".")
    owner = dict(module.named_modules()).get(path, nn.Module())
    present = owner._parameters.get(leaf, owner._buffers.get(leaf))
    if value is not None and present is not None and value.shape == present.shape:
        if value.dtype != present.dtype:
            present.data = present.to(value.dtype)
        present.copy_(value)
    elif leaf in owner._buffers:
        owner._buffers[leaf] = None if value is None else value.to(next(module.parameters()).device)
    else:
        raise NoPlace(name, value)
