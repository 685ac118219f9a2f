"""The shortest loop that one can write by hand: what our training step is held against.

The same transformer with the same adapters and the layers of PyTorch and timm: no Lightning, no strategy, no
hook. All adapters of a layer are one ``A`` and one ``B``, so that no step has to put anything together; where
``B`` belongs to no adapter, it stays zero. In half precision the weights of frozen layers are rounded once,
and nothing else is kept of them.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.bench.memory import held_bytes
from cl_bench.contracts.datamodule import Batch
from cl_bench.contracts.strategy import Strategy
from cl_bench.network.adapters import AdaptedLinear
from cl_bench.network.frozen import Frozen

_LEARNING_RATE = 1e-4
_COPIES = 3  # of a trained tensor: itself, and the two averages of Adam


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
                vit.set_submodule(name, _plain(module, torch.bfloat16 if half else torch.float32))
        head = nn.Linear(strategy.backbone.feature_dim, classes, device=strategy.device)
        self.model = nn.Sequential(vit, head)
        self._adapted = [module for module in vit.modules() if isinstance(module, _Adapted)]
        self._belongs = [layer.belongs() for layer in self._adapted]
        self.half = half
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=_LEARNING_RATE, fused=True)

    def step(self, batch: Batch) -> None:
        """Take one step on images and labels, which count from 0."""
        images, labels = batch
        with self.precision(images.device.type):
            loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        gradients = [layer.B.grad for layer in self._adapted if layer.B.grad is not None]
        torch._foreach_mul_(gradients, self._belongs)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def held_bytes(self) -> int:
        """Bytes of what it keeps from step to step, as separate factors would take them.

        Whatever there is where ``B`` belongs to no adapter is left out, and so is what says where that is:
        both save time, and whoever has little memory would do without.
        """
        unused = sum(int((belongs == 0).sum()) * belongs.element_size() for belongs in self._belongs)
        return held_bytes(self.model, self.optimizer) - _COPIES * unused

    def precision(self, kind: str) -> AbstractContextManager[object]:
        """Return the context of its forward pass on a ``kind`` of device."""
        return torch.autocast(kind, torch.bfloat16) if self.half else nullcontext()


def _plain(layer: Frozen, dtype: torch.dtype) -> nn.Module:
    """Return what computes the same as ``layer`` by PyTorch's own means, with weights in ``dtype``."""
    if isinstance(layer, AdaptedLinear):
        return _Adapted(layer, dtype)
    plain: nn.Linear | nn.Conv2d
    if isinstance(layer, nn.Conv2d):  # over patches, which neither overlap nor are padded
        sizes = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride
        plain = nn.Conv2d(*sizes, bias=layer.bias is not None, device="meta")  # type: ignore[arg-type]
    else:
        out_features, in_features = layer.weight.shape
        plain = nn.Linear(in_features, out_features, layer.bias is not None, device="meta")
    plain.weight, plain.bias = _in_type(layer, dtype)
    return plain


def _in_type(layer: Frozen, dtype: torch.dtype) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Return weight and bias of ``layer`` in ``dtype``."""
    weight, bias = (
        None if tensor is None else nn.Parameter(tensor.detach().to(dtype), requires_grad=False)
        for tensor in (layer.weight, layer.bias)
    )
    assert weight is not None
    return weight, bias


class _Adapted(nn.Module):
    """``W x + b + B (A x)``."""

    def __init__(self, layer: AdaptedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        adapters = [(rows, layer.adapter(name)) for name, rows in layer.rows.items()]
        self.weight, self.bias = _in_type(layer, dtype)
        # The scale goes into A, so that B learns as fast as ours does where A is frozen.
        self.A = nn.Parameter(
            torch.cat([adapter.scale * adapter.A.detach() for _, adapter in adapters]),
            requires_grad=any(adapter.A.requires_grad for _, adapter in adapters),
        )
        self.B = nn.Parameter(layer.weight.new_zeros(len(layer.weight), len(self.A)))
        self._blocks: list[tuple[slice, slice]] = []
        start = 0
        for rows, adapter in adapters:
            self._blocks.append((rows, slice(start, start + len(adapter.A))))
            self.B.data[self._blocks[-1]] = adapter.B.detach()
            start += len(adapter.A)

    def belongs(self) -> Tensor:
        """Return 1 where an element of ``B`` belongs to an adapter, and 0 elsewhere."""
        belongs = torch.zeros_like(self.B, requires_grad=False)
        for block in self._blocks:
            belongs[block] = 1
        return belongs

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.A), self.B)
