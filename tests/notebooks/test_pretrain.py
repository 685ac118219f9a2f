from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from pretraining import pretrain
from pretraining.pool import Recipe, ScenePool
from timm.models.vision_transformer import VisionTransformer

from cl_bench.network.embedded import OPTIONS

TINY = Recipe(scenes=48, fitted=250, entries=100, shard=32)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "BATCH", 8)
    monkeypatch.setattr(pretrain, "STEPS_AN_EPOCH", 2)
    monkeypatch.setattr(pretrain, "_WHITENED", 20)
    monkeypatch.setattr(pretrain, "GLYPHS", ((4, 32), (2, 64)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pool."""
    folder = tmp_path_factory.mktemp("pool")
    ScenePool(folder, TINY, CPU)
    return folder


def trained(run: Path, pool: Path, steps: int, stop_after: int | None = None) -> pretrain.Pretraining:
    run.mkdir(exist_ok=True)
    if not (run / "pool").exists():
        (run / "pool").symlink_to(pool)
    return pretrain.pretrain(run, recipe=TINY, steps=steps, accelerator="cpu", stop_after=stop_after)


def losses(run: Path) -> list[float]:
    """The loss at each step, over all calls."""
    files = sorted((run / "curves").glob("version_*/metrics.csv"))
    return [float(row["loss"]) for file in files for row in csv.DictReader(file.read_text().splitlines())]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_losses_are_the_same_twice_and_after_an_interruption(folder: Path, tmp_path: Path) -> None:
    whole, again, cut = tmp_path / "whole", tmp_path / "again", tmp_path / "cut"
    trained(whole, folder, 6)
    trained(again, folder, 6)
    trained(cut, folder, 6, stop_after=4)
    trained(cut, folder, 6)
    assert len(losses(whole)) == 6
    assert losses(again) == losses(cut) == losses(whole)
    weights = [safetensors.torch.load_file(run / "vit.safetensors") for run in (whole, again, cut)]
    for name, tensor in weights[0].items():
        assert torch.equal(weights[1][name], tensor)
        assert torch.equal(weights[2][name], tensor)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_exported_weights_give_the_features_of_training(folder: Path, tmp_path: Path) -> None:
    module = trained(tmp_path, folder, 2)
    exported = VisionTransformer(num_classes=0, **OPTIONS)
    exported.load_state_dict(safetensors.torch.load_file(tmp_path / "vit.safetensors"))
    scenes, _ = ScenePool(folder, TINY, CPU)[[0, 5]]
    with torch.no_grad():
        expected, found = module.vit(scenes / 127.5 - 1), exported(scenes / 255)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)  # weights are rounded to half precision


def test_an_interrupted_pool_is_completed_to_the_same_scenes(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*"):
        if "00001" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    completed, whole = ScenePool(tmp_path, TINY, CPU), ScenePool(folder, TINY, CPU)
    for one, other in zip(completed[[3, 40]], whole[[3, 40]], strict=True):
        assert torch.equal(one, other)


def test_another_seed_is_another_pool(folder: Path, tmp_path: Path) -> None:
    other = ScenePool(tmp_path, replace(TINY, scenes=16, seed=1), CPU)
    assert not torch.equal(other[[0]][0], ScenePool(folder, TINY, CPU)[[0]][0])


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_the_first_200_steps_of_the_recipe_give_the_same_losses_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    recipe = replace(Recipe(), scenes=2_000)
    curves = []
    for run in (tmp_path / "one", tmp_path / "other"):
        pretrain.pretrain(run, recipe=recipe, steps=3_000, accelerator="cpu", stop_after=200)
        curves.append(losses(run))
    assert len(curves[0]) == 200
    assert curves[0] == curves[1]
    assert curves[0][-1] < curves[0][0]
