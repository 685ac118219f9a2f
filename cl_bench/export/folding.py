"""A strategy as a plain transformer of timm: one set of weights, and one linear layer for the classes.

Adapters are added to the weights that they belong to. A head is folded into a linear layer by its outputs for
the zero vector and for each unit vector. That is exact for linear heads. A head of cosines becomes linear in
the feature once it is multiplied by the feature's length, which changes no prediction: its logits are then
those cosines times that length. The negative distance to a mean m orders classes as f · m - ‖m‖² / 2 does.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.contracts.prompted import PromptedStrategy
from cl_bench.contracts.strategy import Strategy
from cl_bench.network import embedded
from cl_bench.network.adapters import AdaptedLinear
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import Prototypes

_BY_OPTIONS = "vit_base_patch16_224"  # has the defaults of timm's VisionTransformer
_REMEDY = "use it with cl_bench.load instead."
_TOLERANCE = 1e-4  # of features, and of logits relative to their spread; merging only rounds


@dataclass(frozen=True)
class Plain:
    """What ``timm.create_model(architecture, num_classes=…, **options)`` loads.

    Attributes:
        architecture: Name of a model of timm.
        options: Its arguments.
        state: Its state.
        exact_logits: Whether its logits are those of the strategy; otherwise only the predictions are.
    """

    architecture: str
    options: dict[str, Any]
    state: dict[str, Tensor]
    exact_logits: bool

    @property
    def num_classes(self) -> int:
        """Number of classes seen."""
        return len(self.state["head.bias"])


@torch.no_grad()
def plain(strategy: Strategy) -> Plain:
    """Return ``strategy``, in float32 and on the CPU, as a plain transformer.

    Before it is returned, both are compared on random images.

    Raises:
        ValueError: If timm cannot hold what the strategy computes, in words.
    """
    _require_plain_forward(strategy)
    backbone = strategy.backbone
    state = merged(backbone)
    state["head.weight"], state["head.bias"] = _linear(strategy)
    architecture, options = _architecture(backbone)
    model = timm.create_model(architecture, num_classes=strategy.head.num_classes, **options).eval()
    unknown = sorted(state.keys() - model.state_dict().keys())
    if unknown:
        raise ValueError(
            f"{strategy.name} computes with {unknown[0]}, and timm's transformer has no place for it: "
            f"{_REMEDY}"
        )
    model.load_state_dict(state)
    return Plain(architecture, options, state, _compared(strategy, model))


def merged(backbone: Backbone) -> dict[str, Tensor]:
    """Return the state of the transformer of ``backbone``, with every adapter in the weight it belongs to.

    Raises:
        ValueError: If a gate makes what an adapter adds depend on the image.
    """
    vit = backbone.vit
    layers = {name: layer for name, layer in vit.named_modules() if isinstance(layer, AdaptedLinear)}
    found = {}
    for name, tensor in vit.state_dict().items():
        path, _, leaf = name.rpartition(".")
        owner = next((layer for layer in layers if path == layer or path.startswith(f"{layer}.")), None)
        if owner is None or (path == owner and leaf == "bias"):
            found[name] = tensor.clone()
    return found | {f"{name}.weight": layer.effective_weight() for name, layer in layers.items()}


def _require_plain_forward(strategy: Strategy) -> None:
    """Refuse a method that does more with an image than a transformer and its head do."""
    class_ = type(strategy)
    if isinstance(strategy, PromptedStrategy):
        raise ValueError(
            f"{strategy.name} makes prompts for every image, and timm's transformer has no place for them: "
            f"{_REMEDY}"
        )
    for method, what in (("features", "features"), ("forward", "logits")):
        if getattr(class_, method) is not getattr(Strategy, method):
            raise ValueError(
                f"{strategy.name} computes {what} in a way of its own, and timm holds one transformer with "
                f"one linear layer: {_REMEDY}"
            )


def _linear(strategy: Strategy) -> tuple[Tensor, Tensor]:
    """Return weight (C, d) and bias (C,) of the linear layer that predicts what the head predicts."""
    head, width = strategy.head, strategy.backbone.feature_dim
    if isinstance(head, Prototypes) and head.similarity == "euclidean":
        return head.means.clone(), -head.means.square().sum(dim=1) / 2
    probes = torch.cat([torch.zeros(1, width), torch.eye(width)])
    zero, *units = head(probes).unbind()
    weight, bias = torch.stack(units, dim=1) - zero[:, None], zero
    features = torch.randn(256, width, generator=torch.Generator().manual_seed(0))
    if not _predicts(F.linear(features, weight, bias), head(features)):
        raise ValueError(
            f"The head of {strategy.name}, {type(head).__name__}, does not predict as a linear layer does, "
            f"and timm has nothing else: {_REMEDY}"
        )
    return weight.contiguous(), bias.contiguous()


def _compared(strategy: Strategy, model: Any) -> bool:
    """Check that features and predictions agree on random images; return whether the logits do too.

    Raises:
        ValueError: If they do not agree.
    """
    backbone = strategy.backbone
    backbone.compute_in(nullcontext)
    size = backbone.image_size
    images = torch.rand(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    features, logits = backbone(images), strategy(images)
    tokens = model.forward_features((images - backbone.mean) / backbone.std)
    theirs = model.forward_head(tokens, pre_logits=True)
    found = model.get_classifier()(theirs)
    if not torch.allclose(theirs, features, rtol=_TOLERANCE, atol=_TOLERANCE) or not _predicts(found, logits):
        raise ValueError(
            f"{strategy.name} gives other features or predictions than timm's transformer with the same "
            f"weights, so it computes more than that: {_REMEDY}"
        )
    return torch.allclose(found, logits, rtol=_TOLERANCE, atol=_TOLERANCE)


def _predicts(found: Tensor, logits: Tensor) -> bool:
    """Whether logits ``found`` (N, C) predict what ``logits`` do, up to rounding between equal ones."""
    chosen = found.gather(1, logits.argmax(dim=1, keepdim=True))
    spread = found.amax(dim=1, keepdim=True) - found.amin(dim=1, keepdim=True)
    return bool((found.amax(dim=1, keepdim=True) - chosen <= _TOLERANCE * spread).all())


def _architecture(backbone: Backbone) -> tuple[str, dict[str, Any]]:
    """Return the name under which timm makes the model of ``backbone``, and its arguments."""
    own: Mapping[str, Any] = embedded.OPTIONS if backbone.model == "embedded" else {}
    if backbone.model in ("embedded", "vision_transformer"):
        return _BY_OPTIONS, {**own, **backbone.options}
    return backbone.model.partition(".")[0], dict(backbone.options)
