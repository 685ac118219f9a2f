from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from cl_bench.contracts.strategy import Strategy
from cl_bench.data.experience import Experience
from cl_bench.export.folding import plain
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import Prototypes
from strategies.linear_probe import LinearProbe
from strategies.lora import LoRA
from strategies.ncm import NearestClassMean


@pytest.fixture
def backbone(tiny_backbone: Callable[..., Backbone]) -> Backbone:
    """The tiny ViT with a normalisation of its own for every colour."""
    return tiny_backbone(normalisation="imagenet")


def grown(strategy: Strategy) -> Strategy:
    """Return ``strategy`` with two experiences of three classes, in evaluation mode."""
    torch.manual_seed(0)
    for index in range(2):
        strategy.expand(Experience(index, 2, range(3 * index, 3 * index + 3)))
    return strategy.eval()


def logits_in_timm(strategy: Strategy, images: Tensor) -> Tensor:
    found = plain(strategy)
    model: Any = timm.create_model(found.architecture, num_classes=found.num_classes, **found.options)
    model.load_state_dict(found.state)
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    logits: Tensor = model.eval()((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    return logits


IMAGES = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_adapters_that_are_not_merged_become_part_of_the_weight(backbone: Backbone) -> None:
    strategy = grown(LoRA(backbone, rank=2, targets=("q", "v", "fc1"), scale=0.5))
    assert isinstance(strategy, LoRA)
    for _, adapter in strategy.adapters():
        adapter.B.normal_(std=0.1)
    torch.testing.assert_close(logits_in_timm(strategy, IMAGES), strategy(IMAGES), rtol=1e-4, atol=1e-5)
    assert plain(strategy).exact_logits


@pytest.mark.parametrize("similarity", ("cosine", "euclidean"))
@torch.no_grad()
def test_prototypes_become_a_linear_layer_with_the_same_predictions(
    backbone: Backbone, similarity: Any
) -> None:
    strategy = grown(NearestClassMean(backbone, similarity=similarity))
    features = backbone(IMAGES)
    assert isinstance(strategy.head, Prototypes)
    strategy.head.write(features[:6] * torch.tensor([0.5, 1, 2, 1, 1.2, 0.8])[:, None], range(6))
    chosen = strategy(IMAGES).argmax(dim=1)
    assert len(chosen.unique()) > 2
    assert torch.equal(logits_in_timm(strategy, IMAGES).argmax(dim=1), chosen)
    assert not plain(strategy).exact_logits


def test_the_folded_bias_keeps_logits_exact(backbone: Backbone) -> None:
    with torch.no_grad():
        strategy = grown(LinearProbe(backbone))
        torch.testing.assert_close(logits_in_timm(strategy, IMAGES), strategy(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "weights", "options"),
    (("embedded", "pretrained", {}), ("vit_tiny_patch16_224", "random", {"img_size": 32, "depth": 1})),
)
@torch.no_grad()
def test_models_by_name_are_made_again_by_timm(model: str, weights: str, options: dict[str, Any]) -> None:
    strategy = grown(LinearProbe(Backbone(model, weights, options, normalisation="imagenet")))
    size = strategy.backbone.image_size
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(logits_in_timm(strategy, images), strategy(images), rtol=1e-4, atol=1e-5)


def test_a_gated_adapter_is_refused(backbone: Backbone) -> None:
    strategy = LoRA(backbone, rank=2)
    strategy.layers[0].adapter("k").gate = nn.Sequential(nn.Linear(32, 1), nn.Sigmoid())
    with pytest.raises(ValueError, match="A gated adapter adds something else to the weight for every input"):
        plain(grown(strategy))


def test_computation_that_leaves_no_trace_in_the_state_is_detected(backbone: Backbone) -> None:
    strategy = grown(LinearProbe(backbone))
    backbone.blocks[0].register_forward_hook(lambda block, inputs, outputs: 2 * outputs)
    with pytest.raises(ValueError, match="gives other features or predictions than timm's transformer"):
        plain(strategy)


def test_a_head_that_is_not_linear_is_refused(backbone: Backbone) -> None:
    class Squared(Prototypes):
        def forward(self, features: Tensor) -> Tensor:
            return -super().forward(features).square()

    strategy = NearestClassMean(backbone)
    strategy.head = Squared(backbone.feature_dim)
    grown(strategy)
    strategy.head.write(torch.randn(6, 32, generator=torch.Generator().manual_seed(1)), range(6))
    with pytest.raises(ValueError, match="Squared, does not predict as a linear layer does"):
        plain(strategy)
