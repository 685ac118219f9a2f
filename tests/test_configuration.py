from pathlib import Path
from typing import Any

import pytest
import yaml

from cl_bench.configuration import CONFIGS, Configuration, config_file, layers, resolve, stems_of


def toy(*overrides: str, strategy: str = "lora") -> Configuration:
    return resolve(layers(strategy, "toy"), overrides)


@pytest.mark.parametrize("stem", stems_of("datamodules"))
def test_every_shipped_dataset_config_resolves(stem: str) -> None:
    assert toy_or(stem).hash


def toy_or(dataset: str, strategy: str = "lora") -> Configuration:
    root = ["--root=somewhere"] if dataset == "image_folder" else []
    experiences = ["--num_experiences=2"] if dataset == "image_folder" else []
    return resolve(layers(strategy, dataset), [*root, *experiences])


@pytest.mark.parametrize("stem", stems_of("strategies"))
def test_every_shipped_strategy_config_resolves(stem: str) -> None:
    assert toy_or("toy", stem).hash


def test_a_printed_config_saved_and_run_alone_is_the_same_cell(tmp_path: Path) -> None:
    first = toy("--rank=3", "--order=numpy:1993", "--trainer.gradient_clip_val=1")
    path = tmp_path / "saved.yaml"
    path.write_text(first.yaml)
    again = resolve([path])
    assert again.cell == first.cell
    assert again.folder == first.folder
    assert again.yaml == first.yaml


@pytest.mark.parametrize(
    "change",
    [
        "--rank=3",
        "--seed=2",
        "--order=numpy:1",
        "--threads=2",
        "--regime=joint",
        "--batch_size=7",
        "--trainer.max_epochs=9",
        "--trainer.precision=bf16-mixed",
        "--backbone.seed=5",
        "--backbone.normalisation=unit",
        "--model.optimizer.lr=0.7",
    ],
)
def test_a_changed_setting_is_another_cell_in_another_folder(change: str) -> None:
    assert toy(change).hash != toy().hash
    assert toy(change).folder != toy().folder


@pytest.mark.parametrize(
    "change",
    [
        "--results=elsewhere",
        "--num_workers=2",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.log_every_n_steps=3",
        "--setting=named",
        "--wandb",
    ],
)
def test_paths_devices_and_logging_do_not_make_a_new_cell(change: str) -> None:
    assert toy(change).hash == toy().hash


def test_another_data_root_is_the_same_cell_and_another_name_is_not() -> None:
    def folder(*overrides: str) -> Configuration:
        return resolve(layers("lora", "image_folder"), ["--num_experiences=2", *overrides])

    assert folder("--root=/a/birds").hash == folder("--root=/b/birds").hash
    assert folder("--root=/a/birds").hash != folder("--root=/a/fish").hash


def test_a_checkpoint_is_known_by_its_content(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one.safetensors", "copy.safetensors", "other.safetensors")]
    for file, content in zip(files, (b"x", b"x", b"y"), strict=True):
        file.write_bytes(content)
    one, copy, other = (toy(f"--backbone.weights={file}").hash for file in files)
    assert one == copy != other


def test_the_folder_names_benchmark_strategy_setting_order_and_seed() -> None:
    configuration = toy("--setting=small", "--seed=3", "--order=numpy:1993", "--results=there")
    assert configuration.folder == Path(f"there/toy-T3/lora-small/numpy-1993-seed3-{configuration.hash}")
    assert toy(strategy="joint").folder.parent.name == "lora-joint"


def test_later_layers_win_and_another_class_drops_the_arguments_of_the_first(tmp_path: Path) -> None:
    layer = tmp_path / "layer.yaml"
    layer.write_text(yaml.safe_dump({"model": {"init_args": {"rank": 3}}, "trainer": {"max_epochs": 2}}))
    base = layers("lora", "toy")
    assert resolve([*base, layer]).cell["model"]["init_args"]["rank"] == 3
    layer.write_text(yaml.safe_dump({"model": {"class_path": "strategies.ncm.NearestClassMean"}}))
    lora_with_rank = tmp_path / "ranked.yaml"
    lora_with_rank.write_text(yaml.safe_dump({"model": {"init_args": {"rank": 3}}}))
    assert "rank" not in resolve([*base, lora_with_rank, layer]).cell["model"]["init_args"]


def test_defaults_of_torch_and_lightning_are_not_part_of_a_cell() -> None:
    cell = toy("--model.optimizer.lr=0.7").cell
    assert cell["model"]["init_args"]["optimizer"] == {
        "class_path": "torch.optim.Adam",
        "init_args": {"lr": 0.7},
    }
    assert cell["trainer"] == {"max_epochs": 1}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("just words", "its top level must be a mapping"),
        ("a: [", "is not valid YAML"),
        (
            "model: {class_path: strategies.lora.Lora}",
            "strategies.lora.Lora of group model cannot be imported",
        ),
        ("model: {class_path: datamodules.toy.Toy}", "datamodules.toy.Toy is not a Strategy"),
        ("seed: 3", "No layer says which class to use"),
    ],
)
def test_a_broken_config_is_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        resolve([path])


def test_an_unknown_stem_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no config 'lroa' among strategies. Did you mean lora\?"):
        config_file("strategies", "lroa")
    with pytest.raises(FileNotFoundError, match=r"There is no config file nowhere\.yaml"):
        resolve([Path("nowhere.yaml")])


def opening(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith("#")]


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS))
)
def test_every_config_opens_with_its_command(path: Path) -> None:
    assert any("cl-bench " in line for line in opening(path))


def test_resolved_values_are_plain() -> None:
    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        return (
            all(map(plain, value)) if isinstance(value, list) else isinstance(value, str | int | float | None)
        )

    assert plain(toy().cell)
