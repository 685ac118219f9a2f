"""Frozen layers that keep their weights in full precision and multiply by a copy in autocast's type.

Autocast rounds a frozen weight to half precision in every forward pass. Here it is rounded once, and again
only when it has changed: a merge of adapters changes it between experiences, a training step never does.
Products have the same bits either way, and what is saved or merged is always the weight itself.

The trick is ``tensor._version``, which torch raises at every write in place. It does not count a write
through ``weight.data``: write in place under ``torch.no_grad()``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Frozen(nn.Module):
    """What frozen layers share: a weight, a bias, and copies of both in the type of autocast.

    Attributes:
        weight: In full precision.
        bias: In full precision, or None.
    """

    weight: Tensor
    bias: Tensor | None

    def _take_over(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Freeze the tensors of ``layer`` and hold them under their names; they are shared, not copied."""
        self.weight = layer.weight.requires_grad_(False)
        self.bias = None if layer.bias is None else layer.bias.requires_grad_(False)
        # Not buffers: they are neither saved nor sent to other processes.
        self._half_weight: Tensor | None = None
        self._half_bias: Tensor | None = None
        self._copied: list[tuple[object, ...]] = []

    @torch.no_grad()
    def refresh(self, dtype: torch.dtype) -> None:
        """Update the copies in ``dtype`` if the weight has changed."""
        tensors = [self.weight] if self.bias is None else [self.weight, self.bias]
        # A write in place raises the version; a move to another device changes the address.
        found = [(dtype, tensor.device, tensor.data_ptr(), tensor._version) for tensor in tensors]
        if found == self._copied:
            return
        # A copy made in inference mode could not be used in training; leaving that mode turns gradients on.
        with torch.inference_mode(False), torch.no_grad():
            self._half_weight = _rounded(self.weight, dtype, self._half_weight)
            self._half_bias = None if self.bias is None else _rounded(self.bias, dtype, self._half_bias)
        self._copied = list(found)

    def follow(self) -> None:
        """Update existing copies after the weight was written."""
        if self._half_weight is not None:
            self.refresh(self._half_weight.dtype)

    @property
    def is_trained(self) -> bool:
        """Whether weight or bias currently requires a gradient."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def in_precision(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias for a product: under autocast their copies, if there are any."""
        if self._half_weight is None or self.is_trained:
            return self.weight, self.bias
        if torch.is_autocast_enabled(self.weight.device.type):
            return self._half_weight, self._half_bias
        return self.weight, self.bias


class FrozenLinear(Frozen, nn.Linear):  # type: ignore[misc]  # to torch a bias is never None
    """A linear layer whose weight is frozen.

    Args:
        linear: The layer whose tensors it takes over.

    >>> linear = nn.Linear(4, 6)
    >>> layer = FrozenLinear(linear)
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     refresh(layer)
    ...     torch.equal(layer(torch.ones(1, 4)), linear(torch.ones(1, 4)))
    True
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self._take_over(linear)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (…, n) to outputs (…, m)."""
        return F.linear(x, *self.in_precision())


class FrozenConv2d(Frozen, nn.Conv2d):
    """A convolution whose weight is frozen.

    Args:
        convolution: The layer whose tensors it takes over.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__(
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,  # type: ignore[arg-type]
            convolution.stride,  # type: ignore[arg-type]
            convolution.padding,  # type: ignore[arg-type]
            convolution.dilation,  # type: ignore[arg-type]
            convolution.groups,
            convolution.bias is not None,
            padding_mode=convolution.padding_mode,
            device="meta",
        )
        self._take_over(convolution)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (B, C, H, W) to outputs (B, C', H', W')."""
        features: Tensor = self._conv_forward(x, *self.in_precision())
        return features


def freeze_layers(module: nn.Module) -> None:
    """Replace every linear layer and convolution in ``module`` by a frozen one.

    The names and objects of parameters stay. Layers of a subclass stay too, since they may compute more.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> freeze_layers(model)
    >>> model[0]
    FrozenLinear(in_features=2, out_features=3, bias=True)
    """
    for name, layer in list(module.named_modules()):
        if type(layer) is nn.Linear:
            module.set_submodule(name, FrozenLinear(layer))
        elif type(layer) is nn.Conv2d:
            module.set_submodule(name, FrozenConv2d(layer))


def refresh(module: nn.Module) -> None:
    """Under autocast, update the copies of all frozen layers in ``module``."""
    kind = next(module.parameters()).device.type
    if not torch.is_autocast_enabled(kind):
        return
    dtype = torch.get_autocast_dtype(kind)
    for layer in module.modules():
        if isinstance(layer, Frozen):
            layer.refresh(dtype)


def _rounded(tensor: Tensor, dtype: torch.dtype, into: Tensor | None) -> Tensor:
    """Return ``tensor`` in ``dtype``, written into the old copy if that fits, so that it stays one object."""
    if into is None or into.dtype != dtype or into.device != tensor.device or into.shape != tensor.shape:
        return tensor.to(dtype, copy=True)
    return into.copy_(tensor)
