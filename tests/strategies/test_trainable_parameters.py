"""The numbers of trained parameters that papers and logs print, on ViT-B/16 without its weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from cl_bench.contracts.strategy import Strategy
from cl_bench.data.experience import Experience
from cl_bench.network.backbones import Backbone
from strategies.bilora import BiLoRA
from strategies.codyra import CoDyRA
from strategies.ease import EASE
from strategies.ewc_lora import EWCLoRA
from strategies.gainlora import GainLoRA
from strategies.inflora import InfLoRA
from strategies.janus_lora import JanusLoRA
from strategies.keeplora import KeepLoRA
from strategies.loda import LoDA
from strategies.lora import LoRA
from strategies.lora_drs import LoRADRS
from strategies.lora_gpm import LoRAGPM
from strategies.o_lora import OLoRA
from strategies.ranpac import RanPAC
from strategies.sd_lora import SDLoRA
from strategies.slao import SLAO
from strategies.slca import SLCA
from strategies.split_lora import SplitLoRA
from strategies.tuna import TUNA

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
        # InfLoRA's, and a gate of 2 · 768 · 100 weights and a key.
        (GainLoRA, {}, 10, 192_010 + 154_368, 192_010 + 154_368),
        (KeepLoRA, {"weight_threshold": 0.0}, 20, 589_824 + 20 * LINEAR, 589_824 + 20 * LINEAR),
        # The released log of SD-LoRA prints 384,041: its code holds 20 older magnitudes from the start.
        (SDLoRA, {}, 20, 384_041 - 20, 384_041 - 19),
        (LoRADRS, {}, 10, 368_640 + 10 * LINEAR, 368_640 + 10 * LINEAR),
        (BiLoRA, {}, 10, 79_690, 79_690),
        (BiLoRA, {}, 20, 87_380, 87_380),
        (SplitLoRA, {}, 10, 184_320 + 10 * LINEAR, 184_320 + 10 * LINEAR),
        (OLoRA, {}, 10, 376_330, 376_330),
        (
            EWCLoRA,
            {},
            10,
            376_330,
            376_330,
        ),  # CIFAR-100, T=10: printed in the released logs, as are the next two
        (EWCLoRA, {}, 20, 384_020, 384_020),
        (EWCLoRA, {"rank": 30}, 69, 1_158_981, 1_158_981),
        (CoDyRA, {}, 10, 2_655_360 + 10 * LINEAR, 2_655_360 + 10 * LINEAR),
        (CoDyRA, {"targets": ("k", "v"), "rank": 10}, 10, 368_880 + 10 * LINEAR, 368_880 + 10 * LINEAR),
        (SLAO, {}, 10, 376_330, 376_330),
        (LoDA, {}, 10, 1_179_648 + 10 * COSINE, 1_769_472 + 10 * COSINE),
        (LoDA, {"rank": 64}, 20, 2_359_296 + 20 * COSINE, 3_538_944 + 20 * COSINE),
        (EASE, {}, 10, 1_189_632 + 10 * COSINE + 1, 1_189_632 + 10 * COSINE + 1),  # printed by the code
        (TUNA, {"covariance": "diagonal"}, 10, 304_320 + 10 * COSINE, 304_320 + 10 * COSINE),
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
