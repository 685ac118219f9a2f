from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import Callback
from safetensors.torch import save_file
from torch import Tensor

from cl_bench.loop.trainer import StreamTrainer
from cl_bench.measure.moments import second_moments
from cl_bench.network.adapters import inject
from cl_bench.network.backbones import Backbone, Normalisation
from datamodules.toy import Toy
from strategies.inflora import InfLoRA
from strategies.janus_lora import JanusLoRA
from strategies.keeplora import KeepLoRA
from strategies.loda import LoDA
from strategies.lora import LoRA

Making = Callable[..., Backbone]


# Features


def test_features_are_the_class_token_after_the_final_norm(tiny_backbone: Making, images: Tensor) -> None:
    backbone: Any = tiny_backbone()
    tokens = backbone.vit.forward_features(images)
    assert torch.equal(backbone.tokens(images), tokens)
    assert torch.equal(backbone(images), tokens[:, 0])
    torch.testing.assert_close(backbone(images).mean(dim=1), torch.zeros(3), rtol=0, atol=1e-6)


def test_nothing_in_a_backbone_is_trained(tiny_backbone: Making) -> None:
    assert not any(parameter.requires_grad for parameter in tiny_backbone().parameters())


@pytest.mark.parametrize(
    ("normalisation", "mean", "std"),
    [
        ("unit", [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),
        ("half", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
        ("imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("clip", [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    ],
)
def test_images_are_normalised_by_name(
    normalisation: Normalisation, mean: list[float], std: list[float], tiny_backbone: Making, images: Tensor
) -> None:
    backbone = tiny_backbone(normalisation=normalisation)
    by_hand = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(backbone(images), backbone.vit(by_hand))
    assert not {"mean", "std"} & set(backbone.state_dict())


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 8, 4), (2, 1, 8, 8)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...], tiny_backbone: Making) -> None:
    backbone = tiny_backbone()
    for run in (backbone, backbone.tokens):
        with pytest.raises(
            ValueError, match="do not fit a backbone of 8 pixels: set the image_size of the data to 8"
        ):
            run(torch.zeros(shape))


def test_every_later_pass_runs_in_the_precision_that_was_set(tiny_backbone: Making, images: Tensor) -> None:
    backbone = tiny_backbone()
    full = backbone(images)
    with torch.autocast("cpu", torch.bfloat16):
        half = backbone(images)
    assert not torch.equal(half, full)
    backbone.compute_in(lambda: torch.autocast("cpu", torch.bfloat16))
    assert torch.equal(backbone(images), half) and torch.equal(backbone(images), half)
    assert torch.equal(backbone.tokens(images)[:, 0], half)
    assert torch.equal(copy.deepcopy(backbone)(images), full)
    backbone.compute_in(nullcontext)
    assert torch.equal(backbone(images), full)


def test_attention_agrees_in_one_kernel_and_as_products(tiny_backbone: Making, images: Tensor) -> None:
    backbone = tiny_backbone()
    features = []
    for fused in (True, False):
        backbone.fuse_attention(fused)
        assert {block.get_submodule("attn").__dict__["fused_attn"] for block in backbone.blocks} == {fused}
        features.append(backbone(images))
    torch.testing.assert_close(*features)


# Random weights


def test_random_weights_depend_only_on_the_seed(tiny_backbone: Making, images: Tensor) -> None:
    torch.manual_seed(1)
    one = tiny_backbone(seed=3)
    torch.manual_seed(2)
    same, other = tiny_backbone(seed=3), tiny_backbone(seed=4)
    assert torch.equal(one(images), same(images))
    assert not torch.equal(one(images), other(images))
    assert one.weights_sha256 == same.weights_sha256 != other.weights_sha256


def test_the_global_generator_stays_as_it_was(tiny_backbone: Making) -> None:
    before = torch.get_rng_state()
    tiny_backbone()
    assert torch.equal(torch.get_rng_state(), before)


# Names


def test_the_protocol_is_plain_and_names_no_path(tmp_path: Path, tiny_backbone: Making) -> None:
    file = tmp_path / "vit.pt"
    torch.save(tiny_backbone().vit.state_dict(), file)
    backbone = tiny_backbone(file)
    assert json.loads(json.dumps(backbone.protocol())) == {
        "model": "vision_transformer",
        "options": {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
        "weights": "file",
        "weights_sha256": backbone.weights_sha256,
        "normalisation": "unit",
    }


def test_a_missing_checkpoint_is_named(tmp_path: Path, tiny_backbone: Making) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no weights file .*vit\.pt: give a path, or pretrained, or random"
    ):
        tiny_backbone(tmp_path / "vit.pt")


def test_a_misspelt_word_for_weights_is_answered_with_the_nearest(tiny_backbone: Making) -> None:
    with pytest.raises(FileNotFoundError, match=r"did you mean pretrained\?"):
        tiny_backbone("pretraned")


def test_pretrained_weights_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    model: Any = timm.create_model("test_vit.r160_in1k")
    revision = tmp_path / "models--timm--test_vit.r160_in1k"
    (revision / "refs").mkdir(parents=True)
    (revision / "refs" / "main").write_text("0" * 40)
    (revision / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(model.state_dict(), revision / "snapshots" / ("0" * 40) / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    images = torch.rand(1, 3, 160, 160)
    backbone = Backbone("test_vit.r160_in1k")
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(backbone(images), expected)
    assert backbone.protocol()["weights"] == "pretrained"


def test_if_weights_cannot_be_downloaded_the_error_explains_how_to_give_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match=r"get model.safetensors of timm/test_vit.r160_in1k .* its path"
    ):
        Backbone("test_vit.r160_in1k")


def test_a_name_without_a_tag_is_refused_with_the_tags_of_the_model() -> None:
    with pytest.raises(ValueError, match=r"not determine the weights: choose among .*\.augreg_in21k, "):
        Backbone("vit_base_patch16_224")


def test_a_name_without_a_tag_is_enough_for_random_weights() -> None:
    assert Backbone("test_vit", "random", {"img_size": 32}).image_size == 32


def test_a_wrong_tag_is_answered_with_the_nearest_first() -> None:
    with pytest.raises(ValueError, match=r"choose among vit_base_patch16_224.augreg_in21k, "):
        Backbone("vit_base_patch16_224.augreg_21k")


def test_a_wrong_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"no model vit_bas_patch16_224.augreg_in21k: .* vit_base_patch16_224.augreg"
    ):
        Backbone("vit_bas_patch16_224.augreg_in21k")
    with pytest.raises(ValueError, match="nearest names are vision_transformer, "):
        Backbone("vision_transfomer", "random")


def test_a_name_that_timm_has_dropped_is_answered_with_the_current_one() -> None:
    with pytest.raises(ValueError, match=r"timm has dropped: write vit_base_patch16_224.augreg_in21k\."):
        Backbone("vit_base_patch16_224_in21k")


def test_a_model_by_options_has_no_pretrained_weights(tiny_backbone: Making) -> None:
    with pytest.raises(ValueError, match="No pretrained weights belong to vision_transformer"):
        tiny_backbone("pretrained")


# Options


def test_an_unknown_option_is_answered_with_the_nearest(tiny_backbone: Making) -> None:
    with pytest.raises(ValueError, match=r"Did you mean img_size for image_size\?"):
        tiny_backbone(image_size=8)


def test_options_that_contradict_each_other_are_refused(tiny_backbone: Making) -> None:
    with pytest.raises(ValueError, match=r"'num_heads': 3.*dim should be divisible by num_heads"):
        tiny_backbone(num_heads=3)


def test_a_classifier_is_not_an_option(tiny_backbone: Making) -> None:
    with pytest.raises(ValueError, match="num_classes"):
        tiny_backbone(num_classes=10)


def test_images_that_are_not_square_are_refused(tiny_backbone: Making) -> None:
    with pytest.raises(ValueError, match="must be square, not 8 x 16 pixels: give img_size one number"):
        tiny_backbone(img_size=(8, 16))


def test_a_model_that_is_not_a_vision_transformer_is_refused() -> None:
    with pytest.raises(ValueError, match="test_resnet does not consist of attention blocks"):
        Backbone("test_resnet", "random")


# Compilation


@pytest.mark.parametrize(
    ("method", "graphs"),
    [
        # With gradients, for the size of a batch and then for any; and any size in an evaluation.
        (LoRA, [3, 3, 3]),
        (InfLoRA, [3, 3, 3]),
        # Both measure before they train, without gradients but not in inference mode as an evaluation is.
        (KeepLoRA, [4, 4, 4]),
        (JanusLoRA, [4, 4, 4]),  # whose layers keep their inputs in training, and which measures prototypes
        (LoDA, [3, 5, 5]),  # whose layers train other factors from the second experience on
    ],
)
def test_a_stream_compiles_once(
    counted: list[Any],
    method: type[LoRA | InfLoRA | KeepLoRA | JanusLoRA | LoDA],
    graphs: list[int],
    tiny_backbone: Making,
) -> None:
    after: list[int] = []

    class Watch(Callback):
        def on_test_end(self, trainer: Any, pl_module: Any) -> None:
            after.append(len(counted))

    results = []
    for compiler in ("counting", None):
        backbone = tiny_backbone(normalisation="half", compiler=compiler)
        trainer = StreamTrainer(max_epochs=1, accelerator="cpu", callbacks=[Watch()])
        toy = Toy(num_classes=6, images_per_class=20, image_size=8, num_experiences=3, batch_size=14, seed=1)
        results.append(trainer.run(method(backbone, rank=2), toy))
    assert after == graphs + [graphs[-1]] * 3
    compiled, plain = (result.counts("correct") for result in results)
    np.testing.assert_array_equal(compiled, plain)


def test_hooks_of_layers_are_called_in_a_compiled_backbone(tiny_backbone: Making, images: Tensor) -> None:
    backbone = tiny_backbone(compiler="eager")
    layers = inject(backbone, ("k", "v"), rank=2)
    with torch.no_grad():
        backbone(images)
    moments = second_moments(backbone, layers, [(images, torch.zeros(3, dtype=torch.int64))])
    assert moments.diagonal(dim1=-2, dim2=-1).sum() > 0


def test_a_copy_of_a_compiled_backbone_runs_its_own_weights(tiny_backbone: Making, images: Tensor) -> None:
    backbone = tiny_backbone(compiler="eager")
    copied = copy.deepcopy(backbone)
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert not copied(images).any()
    assert backbone(images).any()


def test_a_wrong_compiler_is_answered_with_the_nearest(tiny_backbone: Making) -> None:
    with pytest.raises(ValueError, match=r"no backend 'inducter'\. Did you mean inductor\?"):
        tiny_backbone(compiler="inducter")
