"""Fifty classes of real images and a small pre-trained backbone, if the machine has them."""

import tarfile
from pathlib import Path

import pytest

from cl_bench.results.result import Result
from cl_bench.run.configuration import layers, resolve
from cl_bench.run.run import run

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def images(development_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("development")
    with tarfile.open(development_data / "tiny50.tar") as archive:
        archive.extractall(folder, filter="data")
    return folder / "tiny50"


@pytest.fixture(scope="module")
def options(development_data: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        f"--root={images}",
        "--name=tiny50",
        "--num_experiences=10",
        "--image_size=64",
        "--max_train_per_class=20",
        "--max_test_per_class=10",
        "--backbone.model=vision_transformer",
        f"--backbone.weights={development_data / 'vit_tiny64.safetensors'}",
        "--backbone.options={img_size: 64, patch_size: 8, embed_dim: 192, depth: 6, num_heads: 3}",
        "--backbone.normalisation=half",
        "--model.optimizer=torch.optim.Adam",
        "--model.optimizer.lr=1e-3",
        "--head_lr=5e-3",
        "--max_epochs=2",
        "--threads=2",
        f"--results={tmp_path_factory.mktemp('results')}",
    ]


@pytest.fixture(scope="module")
def results(options: list[str]) -> dict[str, Result]:
    return {name: run(resolve(layers(name, "image_folder"), options)) for name in ("ncm", "lora")}


def test_pretrained_features_make_the_nearest_mean_far_better_than_chance(results: dict[str, Result]) -> None:
    assert results["ncm"].metrics()["acc/sample"] > 10 * 100 / 50


def test_lora_learns_each_experience_and_forgets_between_them(results: dict[str, Result]) -> None:
    values = results["lora"].metrics()
    assert values["plasticity/experience"] > values["acc/experience"] + 5
    assert values["bwt/gem"] < -5
