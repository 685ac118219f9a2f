"""The numbers of trained parameters that papers and logs print, on ViT-B/16 without its weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from cl_bench.contracts.strategy import Strategy
from cl_bench.data.experience import Experience
from cl_bench.network.backbones import Backbone
from strategies.ease import EASE
from strategies.inflora import InfLoRA
from strategies.janus_lora import JanusLoRA
from strategies.keeplora import KeepLoRA
from strategies.loda import LoDA
from strategies.lora import LoRA
from strategies.lora_gpm import LoRAGPM
from strategies.ranpac import RanPAC
from strategies.slca import SLCA

LINEAR, COSINE = 769, 768  # head parameters of a class


@pytest.fixture(scope="module")
def vit() -> Backbone:
    return Backbone("vit_base_patch16_224.augreg_in21k", "random")


@pytest.mark.parametrize(
    ("kind", "settings", "classes", "first", "later"),
    (
        (LoRA, {}, 20, 384_020, 384_020),  # ImageNet-R, T=10
        (LoRA, {}, 10, 376_330, 376_330),  # CIFAR-100, T=10
        (LoRAGPM, {}, 20, 384_020, 384_020),
        (JanusLoRA, {}, 20, 384_020, 384_020),
        (InfLoRA, {}, 10, 192_010, 192_010),  # CIFAR-100 and ImageNet-R, T=20: printed in the released logs
        (InfLoRA, {}, 20, 199_700, 199_700),  # ImageNet-R, T=10: printed as well
        (InfLoRA, {}, 40, 215_080, 215_080),
        (InfLoRA, {"rank": 30}, 69, 606_021, 606_021),  # DomainNet
        (KeepLoRA, {"weight_threshold": 0.0}, 20, 589_824 + 20 * LINEAR, 589_824 + 20 * LINEAR),
        (LoDA, {}, 10, 1_179_648 + 10 * COSINE, 1_769_472 + 10 * COSINE),
        (LoDA, {"rank": 64}, 20, 2_359_296 + 20 * COSINE, 3_538_944 + 20 * COSINE),
        (EASE, {}, 10, 1_189_632 + 10 * COSINE + 1, 1_189_632 + 10 * COSINE + 1),  # printed by the code
        (RanPAC, {"random_features": 8}, 10, 1_189_632 + 10 * COSINE + 1, 0),
        (SLCA, {"covariance": "diagonal"}, 10, 516_096 + 10 * LINEAR, 516_096 + 10 * LINEAR),
    ),
)
def test_trained_parameters_are_those_that_authors_print(
    vit: Backbone, kind: type[Strategy], settings: dict[str, Any], classes: int, first: int, later: int
) -> None:
    strategy = kind(copy.deepcopy(vit), **settings)
    for index, expected in enumerate((first, later)):
        strategy.expand(Experience(index, 5, range(index * classes, (index + 1) * classes)))
        assert strategy.trainable_parameters == expected
