from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from cl_bench.network.backbones import Backbone, weights_identity

Making = Callable[..., Backbone]


def classifier(**changes: Any) -> VisionTransformer:
    """A tiny pretrained model as its authors would save it: with a classifier."""
    torch.manual_seed(7)
    tiny = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**tiny | changes).eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", ".ckpt"])
def test_every_kind_of_checkpoint_gives_the_same_features(
    suffix: str, tmp_path: Path, tiny_backbone: Making, images: Tensor
) -> None:
    model, file = classifier(), tmp_path / f"vit{suffix}"
    if suffix == ".safetensors":
        save_file(model.state_dict(), file)
    else:
        torch.save(model.state_dict(), file)
    assert torch.equal(tiny_backbone(file)(images), model.forward_features(images)[:, 0])


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_a_state_dict_inside_a_training_checkpoint_is_found(
    wrapper: str, tmp_path: Path, tiny_backbone: Making, images: Tensor
) -> None:
    model, file = classifier(), tmp_path / "last.ckpt"
    torch.save({wrapper: model.state_dict(), "epoch": 3}, file)
    assert torch.equal(tiny_backbone(file)(images), model.forward_features(images)[:, 0])


def test_the_final_norm_of_an_average_pooling_model_is_loaded(
    tmp_path: Path, tiny_backbone: Making, images: Tensor
) -> None:
    model, file = classifier(global_pool="avg"), tmp_path / "vit.pt"
    torch.nn.init.normal_(model.get_parameter("fc_norm.weight"), generator=torch.Generator().manual_seed(0))
    torch.save(model.state_dict(), file)
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(tiny_backbone(file, global_pool="avg")(images), expected)


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


# Hashes


def test_the_hash_of_a_checkpoint_is_that_of_its_file(tmp_path: Path, tiny_backbone: Making) -> None:
    file = tmp_path / "vit.pt"
    torch.save(classifier().state_dict(), file)
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert tiny_backbone(file).weights_sha256 == expected
    assert weights_identity("any", str(file)) == f"sha256:{expected}"


def test_the_hash_stays_when_the_weights_change(tiny_backbone: Making) -> None:
    backbone = tiny_backbone()
    before = backbone.weights_sha256
    torch.nn.init.zeros_(backbone.vit.get_parameter("norm.weight"))
    assert backbone.weights_sha256 == before


# What is refused


def test_a_checkpoint_of_other_options_is_refused_with_the_options_that_fit(
    tmp_path: Path, tiny_backbone: Making
) -> None:
    file = tmp_path / "vit.pt"
    state = classifier(img_size=16, depth=3, num_heads=1, embed_dim=16).state_dict()
    del state["norm.weight"]
    torch.save(state, file)
    with pytest.raises(ValueError) as caught:
        tiny_backbone(file)
    message = str(caught.value)
    assert message.startswith(
        f"{file} does not fit vision_transformer: missing: norm.weight (32,); unexpected: "
    )
    assert "blocks.2.norm1.weight (16,), " in message and "and 9 more" in message
    assert "of another shape: cls_token (1, 1, 16) for (1, 1, 32)" in message
    assert message.endswith("its shapes fit img_size 16, patch_size 4, embed_dim 16, depth 3.")


def test_a_checkpoint_of_no_vit_is_refused_without_guessing_options(
    tmp_path: Path, tiny_backbone: Making
) -> None:
    file = tmp_path / "cnn.pt"
    torch.save(torch.nn.Linear(2, 3).state_dict(), file)
    with pytest.raises(ValueError, match=r"unexpected: weight \(3, 2\), bias \(3,\)\..* was made with\.$"):
        tiny_backbone(file)


class _RunsCode:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "ran")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(
    zipped: bool, tmp_path: Path, tiny_backbone: Making
) -> None:
    file, traces = tmp_path / "vit.pt", tmp_path / "traces"
    payload = {"state_dict": _RunsCode(traces)}
    if zipped:
        torch.save(payload, file)
    else:
        file.write_bytes(pickle.dumps(payload, protocol=2))
    with pytest.raises(ValueError, match=r"could run code: if you trust it, save its state dict as \.safet"):
        tiny_backbone(file)
    assert not traces.exists()
    if not zipped:
        pickle.loads(file.read_bytes())
        assert traces.exists(), "the checkpoint of this test is harmless, so refusing it shows nothing"


@pytest.mark.parametrize("name", ["vit.safetensors", "vit.pt"])
def test_a_truncated_checkpoint_is_refused(name: str, tmp_path: Path, tiny_backbone: Making) -> None:
    file = tmp_path / name
    if name.endswith(".pt"):
        torch.save(classifier().state_dict(), file)
    else:
        save_file(classifier().state_dict(), file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="check that it is complete"):
        tiny_backbone(file)


def test_a_file_without_tensors_by_name_is_refused(tmp_path: Path, tiny_backbone: Making) -> None:
    file = tmp_path / "vit.pt"
    torch.save({"epoch": 3}, file)
    with pytest.raises(ValueError, match="does not hold tensors by name"):
        tiny_backbone(file)


def quantised(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def with_one(value: float) -> Callable[[Tensor], Tensor]:
    def changed(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return changed


ODD: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "sparse": (lambda tensor: tensor.to_sparse(), r"as a sparse tensor \(torch\.sparse_coo\): save the"),
    "compressed": (
        lambda tensor: tensor.to_sparse_csr(),
        r"as a sparse tensor \(torch\.sparse_csr\): save the",
    ),
    "quantised": (quantised, "as a quantised tensor: save the state dict"),
    "whole numbers": (lambda tensor: tensor.to(torch.int8), "as torch.int8, and weights are floating-point"),
    "complex": (lambda tensor: tensor.to(torch.complex64), "as torch.complex64, and weights are"),
    "meta": (lambda tensor: tensor.to("meta"), "as a tensor without numbers, on the device meta: save"),
    "nan": (
        with_one(float("nan")),
        "holds numbers in .* that are not finite, .*: take an earlier checkpoint",
    ),
    "infinite": (with_one(float("inf")), "holds numbers in .* that are not finite"),
    "not a tensor": (lambda tensor: tensor.tolist(), "does not hold tensors by name"),
}


@pytest.mark.filterwarnings("ignore")  # torch's remarks on the future of sparse and quantised tensors
@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_are_not_dense_finite_numbers_end_in_one_sentence(
    kind: str, tmp_path: Path, tiny_backbone: Making
) -> None:
    change, message = ODD[kind]
    file, state = tmp_path / "vit.pt", classifier().state_dict()
    state["blocks.0.attn.qkv.weight"] = change(state["blocks.0.attn.qkv.weight"])
    torch.save(state, file)
    with pytest.raises(ValueError, match=message) as caught:
        tiny_backbone(file)
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [0, 1.5, None, ("blocks", 0), b"norm.weight"])
def test_a_key_that_is_not_a_name_ends_in_one_sentence(
    key: Any, tmp_path: Path, tiny_backbone: Making
) -> None:
    file = tmp_path / "vit.pt"
    torch.save({key: torch.zeros(2)}, file)
    with pytest.raises(
        ValueError, match=r"holds a tensor under .*, which is not a name: save the state dict"
    ):
        tiny_backbone(file)


def test_half_precision_is_read_as_the_model_needs_it(tmp_path: Path, tiny_backbone: Making) -> None:
    file, model = tmp_path / "vit.pt", classifier()
    torch.save({key: value.bfloat16() for key, value in model.state_dict().items()}, file)
    found = tiny_backbone(file).vit.get_parameter("norm.weight")
    expected = model.get_parameter("norm.weight").bfloat16().float()
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_a_header_of_safetensors_that_claims_too_much_ends_in_one_sentence(
    tmp_path: Path, tiny_backbone: Making
) -> None:
    for number, header in enumerate(
        (b"{", b"[" * 10_000, b'{"a":{"dtype":"F4","shape":[-1],"data_offsets":[0,0]}}')
    ):
        file = tmp_path / f"{number}.safetensors"
        for length in (len(header), 2**62):
            file.write_bytes(length.to_bytes(8, "little") + header)
            with pytest.raises(ValueError, match="check that it is complete"):
                tiny_backbone(file)


def test_a_file_of_another_kind_is_refused(tmp_path: Path, tiny_backbone: Making) -> None:
    file = tmp_path / "vit.npz"
    file.touch()
    with pytest.raises(ValueError, match=r"give a file that ends in \.safetensors, \.pt, .* or \.ckpt"):
        tiny_backbone(file)
