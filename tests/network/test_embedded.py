from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import interpolate

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


def test_smaller_images_get_the_position_embedding_of_their_grid() -> None:
    trained, small = Backbone("embedded"), Backbone("embedded", options={"img_size": 32})
    assert small(torch.rand(2, 3, 32, 32)).shape == (2, small.feature_dim)
    full, resampled = trained.vit.state_dict(), small.vit.state_dict()
    assert all(torch.equal(full[key], resampled[key]) for key in full if key != "pos_embed")
    grid = full["pos_embed"].reshape(1, 8, 8, -1).permute(0, 3, 1, 2)
    expected = interpolate(grid, size=(4, 4), mode="bicubic", antialias=True)
    torch.testing.assert_close(resampled["pos_embed"], expected.flatten(2).mT)
    assert small.weights_sha256 == trained.weights_sha256


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
