import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cl_bench.__main__ import main
from cl_bench.network.backbones import Backbone
from cl_bench.run.configs import CONFIGS, load, stems_of
from cl_bench.run.configuration import Configuration, layers, resolve


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


def test_a_printed_config_run_from_a_file_is_the_same_cell(tmp_path: Path) -> None:
    first = toy("--rank=3", "--order=numpy:1993", "--trainer.gradient_clip_val=1", "--setting=1e3")
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


def test_the_content_of_a_weights_file_identifies_it(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one.safetensors", "copy.safetensors", "other.safetensors")]
    for file, content in zip(files, (b"x", b"x", b"y"), strict=True):
        file.write_bytes(content)
    one, copy, other = (toy(f"--backbone.weights={file}").hash for file in files)
    assert one == copy != other


def test_the_folder_names_benchmark_strategy_setting_order_and_seed() -> None:
    configuration = toy("--setting=small", "--seed=3", "--order=numpy:1993", "--results=there")
    assert configuration.folder == Path(f"there/toy-T3/lora-small/numpy-1993-seed3-{configuration.hash}")
    assert toy(strategy="joint").folder.parent.name == "lora-joint"


def test_later_layers_win_and_a_new_class_drops_the_arguments_of_the_old(tmp_path: Path) -> None:
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
        (
            "model: {class_path: strategies.lora.Lora}",
            "'strategies.lora.Lora': .* Did you mean strategies.lora.LoRA",
        ),
        (
            "model: {class_path: datamodules.toy.Toy}",
            "'datamodules.toy.Toy': it is not a subclass of Strategy",
        ),
        ("model: {class_path: LoRA}", r"broken.yaml cannot be 'LoRA': write module.Class"),
        ("model: {class_path: 3}", r"model.class_path in .*broken.yaml cannot be 3: write module.Class"),
        (
            "model: {rank: 3}",
            r"model.rank in .*broken.yaml has no effect: write it as model.init_args.rank",
        ),
        ("model: 3", r"model in .*broken.yaml cannot be 3: write it as a mapping"),
        ("model: {init_args: 3}", r"model.init_args in .*broken.yaml cannot be 3: write it as a mapping"),
        ("trainer: [1]", r"trainer in .*broken.yaml cannot be \[1\]: write it as a mapping"),
        ("code: 3", r"code in .*broken.yaml cannot be 3: write a list of folders"),
        ("seed: 3", "No layer names the class of model"),
    ],
)
def test_a_broken_config_is_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        resolve([path])


@pytest.mark.parametrize(
    ("word", "sentence"),
    (
        ("--wandb_project=mine", "--wandb_project has no effect without --wandb: add it"),
        ("--trainer.logger=false", "There is no key trainer.logger"),
    ),
)
def test_an_option_without_effect_is_refused(word: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        resolve(layers("ncm", "toy"), [word])
    assert (
        resolve(layers("ncm", "toy"), ["--wandb", "--wandb_project=mine"]).namespace.wandb_project == "mine"
    )


def test_an_empty_group_sets_nothing(tmp_path: Path) -> None:
    layer = tmp_path / "layer.yaml"
    layer.write_text("{model: {init_args: null}, data: null, trainer: null, backbone: null}")
    assert resolve([*layers("lora", "toy"), layer]).cell == toy().cell


def test_the_name_of_a_backbone_in_a_layer_replaces_all_its_settings(tmp_path: Path) -> None:
    layer = tmp_path / "layer.yaml"
    layer.write_text("backbone: embedded")
    backbone = resolve([*layers("lora", "toy"), layer]).cell["backbone"]
    defaults = Backbone("embedded").protocol()
    assert backbone["weights"] == f"sha256:{defaults['weights_sha256']}"
    assert backbone["options"] is None
    assert backbone["normalisation"] == defaults["normalisation"]


def test_the_error_of_a_wrong_key_names_the_file_of_its_layer(tmp_path: Path) -> None:
    layer = tmp_path / "layer.yaml"
    layer.write_text("model: {init_args: {rnak: 3}}")
    with pytest.raises(ValueError, match=r"no key model.rnak in .*layer.yaml. Did you mean model.rank\?"):
        resolve([*layers("lora", "toy"), layer])


MINIMAL = """
from cl_bench.contracts.strategy import Strategy


class Minimal(Strategy):
    def __init__(self, backbone, *, strength: float = 0.5):
        super().__init__(backbone)
"""


def minimal(folder: Path, module: str) -> Path:
    (folder / f"{module}.py").write_text(MINIMAL)
    config = folder / "minimal.yaml"
    config.write_text(f"model: {{class_path: {module}.Minimal}}")
    return config


def test_an_optimizer_for_a_strategy_without_one_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        resolve(layers(str(minimal(tmp_path, "without_optimizer")), "digits"))
    assert str(caught.value) == (
        f"There is no key model.optimizer in {CONFIGS / 'datamodules' / 'digits.yaml'}. "
        "Let Minimal take **kwargs and pass them to super().__init__."
    )


def test_a_printed_config_finds_the_strategy_in_the_folder_of_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, path = "in_the_folder_of_its_config", list(sys.path)
    first = resolve(layers(str(minimal(tmp_path, module)), "cifar100"))
    saved = tmp_path / "elsewhere" / "saved.yaml"
    saved.parent.mkdir()
    saved.write_text(first.yaml)
    assert first.resolved["code"] == [str(tmp_path)]
    assert "code" not in first.cell
    assert "code" not in toy().resolved
    # As in a new process, in another folder.
    monkeypatch.setattr(sys, "path", path)
    monkeypatch.delitem(sys.modules, module)
    monkeypatch.chdir(saved.parent)
    again = resolve([saved])
    assert module in sys.modules
    assert (again.hash, again.yaml) == (first.hash, first.yaml)


def test_the_command_line_and_python_give_the_same_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["lora", "toy", "--trainer.gradient_clip_val=1", "--trainer.precision=bf16", "--print_config"]
    assert main(["run", *words]) == 0
    printed = capsys.readouterr().out
    saved = tmp_path / "saved.yaml"
    saved.write_text(printed)
    here = toy("--trainer.gradient_clip_val=1.0", "--trainer.precision=bf16-mixed")
    assert resolve([saved]).hash == here.hash
    assert printed == here.yaml


@pytest.mark.parametrize(
    "names", (("32", "32-true", None), ("16", "16-mixed"), ("bf16", "bf16-mixed"), ("64", "64-true"))
)
def test_all_names_of_a_precision_give_the_same_cell(tmp_path: Path, names: tuple[str | None, ...]) -> None:
    hashes = {toy(*([f"--trainer.precision={name}"] if name else [])).hash for name in names}
    layer = tmp_path / "layer.yaml"
    for written in (names[0], f"'{names[0]}'") if names[0] != "bf16" else ("bf16",):
        layer.write_text(f"trainer: {{precision: {written}}}")
        hashes.add(resolve([*layers("lora", "toy"), layer]).hash)
    assert len(hashes) == 1


def test_text_that_looks_like_a_number_stays_text_in_a_printed_config(tmp_path: Path) -> None:
    first = toy("--setting=1e3", "--results=1.5e3")
    saved = tmp_path / "saved.yaml"
    saved.write_text(first.yaml)
    again = resolve([saved])
    assert (again.namespace.setting, again.results) == ("1e3", Path("1.5e3"))


def test_resolved_values_are_plain() -> None:
    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        return (
            all(map(plain, value)) if isinstance(value, list) else isinstance(value, str | int | float | None)
        )

    assert plain(toy().cell)


RECIPES = sorted((CONFIGS / "recipes").glob("*/*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_resolves_and_names_the_source_of_every_line(recipe: Path) -> None:
    comment, *lines = (line for line in recipe.read_text().splitlines() if line.strip())
    command, _, order = comment.partition(" --order ")
    assert command == f"# cl-bench run {recipe.stem} {recipe.parent.name} --root FOLDER --seed 1"
    words = ["--root=somewhere", f"--order={order or 'identity'}"]
    configuration = resolve(layers(recipe.stem, recipe.parent.name), words)
    assert configuration.resolved["trainer"]["max_epochs"] == load(recipe)["trainer"]["max_epochs"]
    settings = [line for line in lines if not line.lstrip().startswith("#") and not line.endswith(":")]
    assert settings and all("  # " in line for line in settings)


def test_every_benchmark_has_a_recipe_for_every_method_with_adapters() -> None:
    methods = {path.stem for path in CONFIGS.glob("strategies/*.yaml")} - {
        "joint",
        "ncm",
        "simplecil",
        "linear_probe",
        "lora_gpm_gr",  # no source of its own
        "inflora_b5",  # a setting of one published table
    }
    for benchmark in ("imagenet_r", "cifar100", "imagenet100", "domainnet"):
        assert methods <= {path.stem for path in RECIPES if path.parent.name == benchmark}
