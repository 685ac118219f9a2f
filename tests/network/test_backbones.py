from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from cl_bench.loop.trainer import StreamTrainer
from cl_bench.measure.moments import second_moments
from cl_bench.network import embedded
from cl_bench.network.adapters import inject
from cl_bench.network.backbones import Backbone, Normalisation, weights_identity
from datamodules.toy import Toy
from strategies.inflora import InfLoRA
from strategies.janus_lora import JanusLoRA
from strategies.keeplora import KeepLoRA
from strategies.loda import LoDA
from strategies.lora import LoRA

TINY: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def tiny(weights: str | Path = "random", **changes: Any) -> Backbone:
    return Backbone("vision_transformer", str(weights), TINY | changes)


def classifier(seed: int = 7, **changes: Any) -> VisionTransformer:
    """A tiny pretrained model as its authors would save it: with a classifier."""
    torch.manual_seed(seed)
    return VisionTransformer(**TINY | {"num_classes": 5} | changes).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


# Features


def test_features_are_the_class_token_after_the_final_norm(tmp_path: Path, images: torch.Tensor) -> None:
    model = classifier()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    features = tiny(tmp_path / "vit.safetensors")(images)
    assert torch.equal(features, model.forward_features(images)[:, 0])
    torch.testing.assert_close(features.mean(dim=1), torch.zeros(3), rtol=0, atol=1e-6)


def test_nothing_in_a_backbone_is_trained() -> None:
    assert not any(parameter.requires_grad for parameter in tiny().parameters())


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
    normalisation: Normalisation, mean: list[float], std: list[float], images: torch.Tensor
) -> None:
    backbone = Backbone("vision_transformer", "random", TINY, normalisation)
    by_hand = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(backbone(images), backbone.vit(by_hand))
    assert not {"mean", "std"} & set(backbone.state_dict())


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 8, 4), (2, 1, 8, 8)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match="do not fit a backbone of 8 pixels: set the image_size of the data to 8"
    ):
        tiny()(torch.zeros(shape))


# Random weights


def test_random_weights_follow_the_seed_alone(images: torch.Tensor) -> None:
    torch.manual_seed(1)
    one = Backbone("vision_transformer", "random", TINY, seed=3)
    torch.manual_seed(2)
    same = Backbone("vision_transformer", "random", TINY, seed=3)
    other = Backbone("vision_transformer", "random", TINY, seed=4)
    assert torch.equal(one(images), same(images))
    assert not torch.equal(one(images), other(images))
    assert one.weights_sha256 == same.weights_sha256 != other.weights_sha256


def test_the_global_generator_is_left_as_it_was() -> None:
    before = torch.get_rng_state()
    tiny()
    assert torch.equal(torch.get_rng_state(), before)


# Checkpoints


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", ".ckpt"])
def test_every_kind_of_checkpoint_gives_the_same_features(
    suffix: str, tmp_path: Path, images: torch.Tensor
) -> None:
    model, file = classifier(), tmp_path / f"vit{suffix}"
    if suffix == ".safetensors":
        save_file(model.state_dict(), file)
    else:
        torch.save(model.state_dict(), file)
    assert torch.equal(tiny(file)(images), model.forward_features(images)[:, 0])


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_a_state_dict_inside_a_training_checkpoint_is_found(
    wrapper: str, tmp_path: Path, images: torch.Tensor
) -> None:
    model, file = classifier(), tmp_path / "last.ckpt"
    torch.save({wrapper: model.state_dict(), "epoch": 3}, file)
    assert torch.equal(tiny(file)(images), model.forward_features(images)[:, 0])


def test_the_final_norm_of_an_average_pooling_model_is_no_classifier(
    tmp_path: Path, images: torch.Tensor
) -> None:
    model, file = classifier(global_pool="avg"), tmp_path / "vit.pt"
    torch.nn.init.normal_(model.get_parameter("fc_norm.weight"), generator=torch.Generator().manual_seed(0))
    torch.save(model.state_dict(), file)
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(tiny(file, global_pool="avg")(images), expected)


def test_the_hash_of_a_checkpoint_is_that_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "vit.pt"
    torch.save(classifier().state_dict(), file)
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert tiny(file).weights_sha256 == expected
    assert weights_identity("any", str(file)) == f"sha256:{expected}"


def test_the_hash_stays_when_the_weights_change() -> None:
    backbone = tiny()
    before = backbone.weights_sha256
    torch.nn.init.zeros_(backbone.vit.get_parameter("norm.weight"))
    assert backbone.weights_sha256 == before


def test_the_protocol_is_plain_and_names_no_path(tmp_path: Path) -> None:
    file = tmp_path / "vit.pt"
    torch.save(classifier().state_dict(), file)
    backbone = tiny(file)
    assert json.loads(json.dumps(backbone.protocol())) == {
        "model": "vision_transformer",
        "options": TINY,
        "weights": "file",
        "weights_sha256": backbone.weights_sha256,
        "normalisation": "unit",
    }


def test_a_real_checkpoint_gives_the_features_of_the_model_it_was_saved_from(development_data: Path) -> None:
    file = development_data / "vit_tiny64.safetensors"
    described = json.loads(file.with_suffix(".json").read_text())
    options: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}
    backbone = Backbone("vision_transformer", str(file), options, "half")
    assert backbone.weights_sha256 == described["sha256"]
    assert (backbone.feature_dim, backbone.image_size, backbone.depth) == (192, 64, 6)
    model = VisionTransformer(num_classes=0, **options)
    model.load_state_dict(load_file(file))
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(backbone(images), model(2 * images - 1), rtol=0, atol=1e-5)


def test_a_checkpoint_of_other_options_names_keys_shapes_and_the_options_it_was_made_with(
    tmp_path: Path,
) -> None:
    file = tmp_path / "vit.pt"
    state = classifier(img_size=16, depth=3, num_heads=1, embed_dim=16).state_dict()
    del state["norm.weight"]
    torch.save(state, file)
    with pytest.raises(ValueError) as caught:
        tiny(file)
    message = str(caught.value)
    assert message.startswith(
        f"{file} does not fit vision_transformer: missing: norm.weight (32,); unexpected: "
    )
    assert "blocks.2.norm1.weight (16,), " in message and "and 9 more" in message
    assert "of another shape: cls_token (1, 1, 16) for (1, 1, 32)" in message
    assert message.endswith("speak of img_size 16, patch_size 4, embed_dim 16, depth 3.")


def test_a_checkpoint_of_no_vit_is_refused_without_guessing_options(tmp_path: Path) -> None:
    file = tmp_path / "cnn.pt"
    torch.save(torch.nn.Linear(2, 3).state_dict(), file)
    with pytest.raises(ValueError, match=r"unexpected: weight \(3, 2\), bias \(3,\)\..* was made with\.$"):
        tiny(file)


class _RunsCode:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "ran")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(zipped: bool, tmp_path: Path) -> None:
    file, traces = tmp_path / "vit.pt", tmp_path / "traces"
    payload = {"state_dict": _RunsCode(traces)}
    if zipped:
        torch.save(payload, file)
    else:
        file.write_bytes(pickle.dumps(payload, protocol=2))
    with pytest.raises(ValueError, match=r"reading it could run code: save its state dict as \.safetensors"):
        tiny(file)
    assert not traces.exists()
    if not zipped:
        pickle.loads(file.read_bytes())
        assert traces.exists(), "the checkpoint of this test is harmless, so refusing it shows nothing"


@pytest.mark.parametrize("name", ["vit.safetensors", "vit.pt"])
def test_a_checkpoint_cut_short_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if name.endswith(".pt"):
        torch.save(classifier().state_dict(), file)
    else:
        save_file(classifier().state_dict(), file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="see that it is whole"):
        tiny(file)


def test_a_file_without_tensors_by_name_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "vit.pt"
    torch.save({"epoch": 3}, file)
    with pytest.raises(ValueError, match="holds no tensors by name"):
        tiny(file)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "vit.npz"
    file.touch()
    with pytest.raises(ValueError, match=r"give a file in \.safetensors, \.pt"):
        tiny(file)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no weights file .*vit\.pt: give a path, or pretrained, or random"
    ):
        tiny(tmp_path / "vit.pt")


def test_a_misspelt_word_for_weights_is_answered_with_the_nearest() -> None:
    with pytest.raises(FileNotFoundError, match=r"did you mean pretrained\?"):
        tiny("pretraned")


# Pretrained weights


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


def test_weights_that_cannot_be_downloaded_say_how_to_give_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match=r"get model.safetensors of timm/test_vit.r160_in1k .* its path"
    ):
        Backbone("test_vit.r160_in1k")


def test_a_name_without_a_tag_is_refused_with_the_tags_there_are() -> None:
    with pytest.raises(ValueError, match=r"names no weights.*: choose among .*\.augreg_in21k, "):
        Backbone("vit_base_patch16_224")


def test_a_name_without_a_tag_is_enough_where_the_weights_are_given() -> None:
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
        Backbone("vision_transfomer", "random", TINY)


def test_a_name_that_timm_gave_up_is_answered_with_the_one_of_today() -> None:
    with pytest.raises(ValueError, match=r"old name .* write vit_base_patch16_224.augreg_in21k\."):
        Backbone("vit_base_patch16_224_in21k")


def test_a_model_by_options_has_no_pretrained_weights() -> None:
    with pytest.raises(ValueError, match="No pretrained weights belong to vision_transformer"):
        tiny("pretrained")


# Options


def test_an_unknown_option_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"Did you mean img_size for image_size\?"):
        tiny(image_size=8)


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'num_heads': 3.*dim should be divisible by num_heads"):
        tiny(num_heads=3)


def test_a_classifier_is_not_an_option() -> None:
    with pytest.raises(ValueError, match="num_classes"):
        tiny(num_classes=10)


def test_images_that_are_not_square_are_refused() -> None:
    with pytest.raises(ValueError, match="not of 8 x 16 pixels"):
        tiny(img_size=(8, 16))


def test_a_model_that_is_no_vision_transformer_is_refused() -> None:
    with pytest.raises(ValueError, match="test_resnet is no row of attention blocks"):
        Backbone("test_resnet", "random")


def test_attention_agrees_in_one_kernel_and_as_products(images: torch.Tensor) -> None:
    backbone = tiny()
    features = []
    for fused in (True, False):
        backbone.fuse_attention(fused)
        assert {block.get_submodule("attn").__dict__["fused_attn"] for block in backbone.blocks} == {fused}
        features.append(backbone(images))
    torch.testing.assert_close(*features)


@pytest.fixture(scope="module")
def counting_backend() -> list[Any]:
    """The graphs given to ``counting``, a compiler that leaves them as they are."""
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.register_backend(counting, name="counting")
    return graphs


@pytest.fixture
def counted(counting_backend: list[Any]) -> list[Any]:
    """Those of one test, which finds nothing compiled."""
    torch.compiler.reset()
    counting_backend.clear()
    return counting_backend


@pytest.mark.parametrize(
    ("method", "graphs"),
    [
        # With gradients, for the size of a batch and then for any; and any size in an evaluation.
        (LoRA, [3, 3, 3]),
        (InfLoRA, [3, 3, 3]),
        # Both measure before they train, without gradients but not in inference mode as an evaluation is.
        (KeepLoRA, [4, 4, 4]),
        (JanusLoRA, [3, 3, 3]),  # which is listened to in training
        (LoDA, [3, 5, 5]),  # whose layers train other factors from the second experience on
    ],
)
def test_a_stream_compiles_once(
    counted: list[Any], method: type[LoRA | InfLoRA | KeepLoRA | JanusLoRA | LoDA], graphs: list[int]
) -> None:
    after: list[int] = []

    class Watch(Callback):
        def on_test_end(self, trainer: Any, pl_module: Any) -> None:
            after.append(len(counted))

    results = []
    for compiler in ("counting", None):
        backbone = Backbone("vision_transformer", "random", TINY, "half", compiler=compiler)
        trainer = StreamTrainer(max_epochs=1, accelerator="cpu", callbacks=[Watch()])
        toy = Toy(num_classes=6, images_per_class=20, image_size=8, num_experiences=3, batch_size=14, seed=1)
        results.append(trainer.run(method(backbone, rank=2), toy))
    assert after == graphs + [graphs[-1]] * 3
    compiled, plain = (result.counts("correct") for result in results)
    np.testing.assert_array_equal(compiled, plain)


def test_whoever_listens_hears_a_compiled_backbone() -> None:
    backbone = Backbone("vision_transformer", "random", TINY, compiler="eager")
    layers = inject(backbone, ("k", "v"), rank=2)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        backbone(images)
    moments = second_moments(backbone, layers, [(images, torch.zeros(2, dtype=torch.int64))])
    assert moments.diagonal(dim1=-2, dim2=-1).sum() > 0


def test_a_wrong_compiler_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no backend 'inducter'\. Did you mean inductor\?"):
        Backbone("vision_transformer", "random", TINY, compiler="inducter")


# The embedded backbone


def test_the_embedded_backbone_loads_by_its_name_alone() -> None:
    backbone = Backbone("embedded")
    assert backbone.weights_sha256 == embedded.SHA256
    with torch.no_grad():
        features = backbone(torch.rand(2, 3, backbone.image_size, backbone.image_size))
    assert features.shape == (2, backbone.feature_dim)
    assert weights_identity("embedded", "pretrained") == f"sha256:{embedded.SHA256}"


def test_the_embedded_architecture_takes_random_weights() -> None:
    random, trained = Backbone("embedded", weights="random", seed=3), Backbone("embedded")
    assert random.vit.state_dict().keys() == trained.vit.state_dict().keys()
    assert random.weights_sha256 != trained.weights_sha256


def test_the_embedded_weights_are_at_most_eight_megabytes() -> None:
    assert embedded.weights_file().stat().st_size <= 8_000_000


@pytest.mark.parametrize(
    ("content", "error"), [(b"x", "have the sha256 2d711642b726b044… instead of"), (None, "are missing")]
)
def test_embedded_weights_that_are_not_the_shipped_ones_are_refused(
    content: bytes | None, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "vit.safetensors").write_bytes(content)
    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(
        (ValueError, FileNotFoundError), match=f"{error}.*check out or install the suite anew"
    ):
        Backbone("embedded")
