from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cl_bench.network import embedded
from cl_bench.network.backbones import Backbone, weights_identity


def test_the_embedded_backbone_needs_only_its_name() -> None:
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
    with pytest.raises((ValueError, FileNotFoundError), match=f"{error}.*check out or reinstall the suite"):
        Backbone("embedded")
