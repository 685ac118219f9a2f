"""The shortest loop that one can write by hand: what our training step is held against.

The same transformer with the same adapters and the layers of PyTorch and timm: no Lightning, no strategy, no
hook. All adapters of a layer are one ``A`` and one ``B``, so that no step has to put anything together; where
``B`` belongs to no adapter, it stays zero.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.adapters import AdaptedLinear
from cl_bench.datamodule import Batch
from cl_bench.frozen import Frozen
from cl_bench.strategy import Strategy

_LEARNING_RATE = 1e-4


class Floor:
    """A hand-written training of the adapters that a strategy has at the moment, and of a head.

    Args:
        strategy: What is copied: the transformer, its adapters and which of their factors are trained.
        classes: Columns of the head.
        half: Whether products are taken in bfloat16, by autocast.

    Attributes:
        model: The transformer, and the head after it.
        optimizer: Adam in one kernel, over what is trained.
    """

    def __init__(self, strategy: Strategy, classes: int, *, half: bool) -> None:
        vit = copy.deepcopy(strategy.backbone.vit)
        for name, module in list(vit.named_modules()):
            if isinstance(module, Frozen):
                vit.set_submodule(name, _plain(module))
        head = nn.Linear(strategy.backbone.feature_dim, classes, device=strategy.device)
        self.model = nn.Sequential(vit, head)
        self._adapted = [module for module in vit.modules() if isinstance(module, _Adapted)]
        self.half = half
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=_LEARNING_RATE, fused=True)

    def step(self, batch: Batch) -> None:
        """Take one step on images and labels, which count from 0."""
        images, labels = batch
        with self.precision(images.device.type):
            loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        for layer in self._adapted:
            assert layer.B.grad is not None
            layer.B.grad.mul_(layer.belongs)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def precision(self, kind: str) -> AbstractContextManager[object]:
        """Return the context of its forward pass on a ``kind`` of device."""
        return torch.autocast(kind, torch.bfloat16) if self.half else nullcontext()


def _plain(layer: Frozen) -> nn.Module:
    """Return what computes the same as ``layer`` by PyTorch's own means."""
    if isinstance(layer, AdaptedLinear):
        return _Adapted(layer)
    plain: nn.Linear | nn.Conv2d
    if isinstance(layer, nn.Conv2d):  # over patches, which neither overlap nor are padded
        sizes = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride
        plain = nn.Conv2d(*sizes, bias=layer.bias is not None, device="meta")  # type: ignore[arg-type]
    else:
        out_features, in_features = layer.weight.shape
        plain = nn.Linear(in_features, out_features, layer.bias is not None, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


class _Adapted(nn.Module):
    """``W x + b + B (A x)``."""

    def __init__(self, layer: AdaptedLinear) -> None:
        super().__init__()
        adapters = [(rows, layer.adapter(name)) for name, rows in layer.rows.items()]
        self.weight, self.bias = layer.weight, layer.bias
        # The scale goes into A, so that B learns as fast as ours does where A is frozen.
        self.A = nn.Parameter(
            torch.cat([adapter.scale * adapter.A.detach() for _, adapter in adapters]),
            requires_grad=any(adapter.A.requires_grad for _, adapter in adapters),
        )
        self.B = nn.Parameter(layer.weight.new_zeros(len(layer.weight), len(self.A)))
        self.belongs = torch.zeros_like(self.B)
        start = 0
        for rows, adapter in adapters:
            stop = start + len(adapter.A)
            self.B.data[rows, start:stop] = adapter.B.detach()
            self.belongs[rows, start:stop] = 1
            start = stop

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.A), self.B)
