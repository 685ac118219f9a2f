from itertools import pairwise
from pathlib import Path

import pytest
from jsonargparse import Namespace

from cl_bench.contracts.strategy import Strategy
from cl_bench.network.backbones import Backbone
from cl_bench.run.configs import stems_of
from cl_bench.run.configuration import layers, resolve
from cl_bench.run.schema import Schema
from datamodules.image_folder import ImageFolder
from datamodules.toy import Toy
from strategies.lora import LoRA


@pytest.fixture(scope="module")
def schema() -> Schema:
    return Schema(LoRA, Toy)


def test_defaults_come_from_the_signatures(schema: Schema) -> None:
    values = schema.parse({}, [])
    assert (values.model.rank, values.model.variant, values.seed) == (10, "merge", 1)


def test_a_strategy_without_arguments_has_an_empty_group() -> None:
    class Bare(Strategy):
        def __init__(self, backbone: Backbone) -> None:
            super().__init__(backbone)

    assert Schema(Bare, Toy).parse({}, []).model == Namespace()


def test_the_command_line_wins_over_the_config(schema: Schema) -> None:
    values = schema.parse({"model": {"rank": 3, "scale": 2.0}}, ["--model.rank", "4"])
    assert (values.model.rank, values.model.scale) == (4, 2.0)


@pytest.mark.parametrize(
    "words", (["--rank", "4"], ["--rank=4"], ["--model.rank=4"], ["--model.init_args.rank", "4"])
)
def test_a_key_works_with_and_without_its_group(schema: Schema, words: list[str]) -> None:
    assert schema.parse({}, words).model.rank == 4


def test_a_nested_class_takes_its_own_arguments(schema: Schema) -> None:
    values = schema.parse(
        {"model": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}}},
        ["--model.optimizer.lr", "0.5"],
    )
    assert values.model.optimizer.init_args.lr == 0.5


def test_seed_and_order_reach_the_datamodule(schema: Schema) -> None:
    values = schema.parse({}, ["--seed", "7", "--order", "numpy:1993"])
    assert (values.data.seed, values.data.order) == (7, "numpy:1993")


@pytest.mark.parametrize(
    "words", (["--wandb"], ["--wandb", "--rank", "4"], ["--wandb=true"], ["--wandb", "true"])
)
def test_wandb_is_a_flag_with_an_optional_value(schema: Schema, words: list[str]) -> None:
    assert schema.parse({}, words).wandb is True


def test_diagnostics_is_a_flag_with_an_optional_value(schema: Schema) -> None:
    assert schema.parse({}, ["--diagnostics", "--rank", "4"]).diagnostics is True
    assert schema.parse({"diagnostics": True}, ["--no_diagnostics", "--wandb"]).diagnostics is False


@pytest.mark.parametrize("words", (["--backbone", "embedded"], ["--backbone=embedded"]))
def test_the_name_of_a_backbone_replaces_all_its_settings(schema: Schema, words: list[str]) -> None:
    config = {"backbone": {"model": "vision_transformer", "weights": "random", "options": {"depth": 2}}}
    assert schema.parse(config, words).backbone == schema.parse({}, ["--backbone.model=embedded"]).backbone


@pytest.mark.parametrize("words", (["--no_wandb"], ["--wandb=false"]))
def test_a_flag_can_be_negated(schema: Schema, words: list[str]) -> None:
    assert schema.parse({"wandb": True}, words).wandb is False


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rnak", "4"], "There is no key rnak. Did you mean model.rank?"),
        (["--model.rnak", "4"], "There is no key model.rnak. Did you mean model.rank?"),
        (["--sede", "4"], "There is no key sede. Did you mean seed?"),
        (["--trainer.max_epoch", "4"], "There is no key trainer.max_epoch. Did you mean trainer.max_epochs?"),
        (["--backbone.weight", "x"], "There is no key backbone.weight. Did you mean backbone.weights?"),
        (["--qqqqqq", "4"], "There is no key qqqqqq. The option --help lists the keys."),
        (["--rank", "x"], "--model.rank cannot be 'x': expected int."),
        (
            ["--variant", "mrege"],
            "--model.variant cannot be 'mrege': expected one of ['merge', 'shared']. Did you mean merge?",
        ),
        (["--trainer.max_epochs", "many"], "--trainer.max_epochs cannot be 'many': expected int or null."),
        (["--seed", "one"], "--seed cannot be 'one': expected int."),
        (
            ["--model.optimizer.lrr", "3"],
            "--model.optimizer cannot be 'torch.optim.Adam': Option 'lrr' is not accepted.",
        ),
        (
            ["--model.scheduler=torch.optim.lr_scheduler.StepLR"],
            "--model.scheduler cannot be 'torch.optim.lr_scheduler.StepLR': "
            "the following arguments are required: step_size.",
        ),
        (
            ["--trainer.callbacks=[{class_path: a.B}]"],
            "--trainer.callbacks cannot be '[{class_path: a.B}]': "
            "Problem with given class_path 'a.B': No module named 'a'.",
        ),
        (["--rank"], "--model.rank needs a value."),
        (["--model.optimizer.lr", "x"], "--model.optimizer.lr cannot be 'x': expected float."),
        (
            ["--model.optimizer", "adam"],
            "--model.optimizer cannot be 'adam': expected the import path of a class. "
            "Did you mean torch.optim.Adam?",
        ),
        (
            ["--model.optimizer=torch.optim.Sgd"],
            "--model.optimizer cannot be 'torch.optim.Sgd': module 'torch.optim' has no attribute 'Sgd'. "
            "Did you mean torch.optim.SGD?",
        ),
        (
            ["--model.scheduler=steplr"],
            "--model.scheduler cannot be 'steplr': expected the import path of a class or null. "
            "Did you mean torch.optim.lr_scheduler.StepLR?",
        ),
        (
            ["--model.optimizer=nowhere.Sgd"],
            "--model.optimizer cannot be 'nowhere.Sgd': No module named 'nowhere'.",
        ),
        (
            ["--model.optimizer=torch.nn.Linear"],
            "--model.optimizer cannot be 'torch.nn.Linear': "
            "Expected 'torch.nn.Linear' to be a subclass of Optimizer.",
        ),
        (["--model=x"], "--model is a group: set its keys one by one, as --model.KEY."),
        (["--data.seed=3"], "There is no key data.seed. Did you mean seed?"),
        (["stray"], "No key takes the value 'stray': write every setting as --KEY VALUE."),
        (["--wandb=maybe"], "--wandb cannot be 'maybe': expected bool."),
        (["--threads=0"], "--threads cannot be 0: expected 1 to 256."),
        (
            ["--setting=a/b"],
            "--setting cannot be 'a/b': it names a folder, so write a word without slashes.",
        ),
        (["--setting=.."], "--setting cannot be '..': it names a folder, so write a word without slashes."),
    ],
)
def test_a_wrong_key_or_value_is_one_sentence_with_the_remedy(
    schema: Schema, words: list[str], sentence: str
) -> None:
    with pytest.raises(ValueError) as caught:
        schema.parse({}, words)
    assert str(caught.value) == sentence


def test_a_wrong_key_in_a_config_is_refused(schema: Schema) -> None:
    with pytest.raises(ValueError, match=r"There is no key model.rnak. Did you mean model.rank\?"):
        schema.parse({"model": {"rnak": 4}}, [])


def test_a_wrong_value_in_a_config_is_one_sentence_that_names_its_file(schema: Schema) -> None:
    def refusal(config: dict[str, object], key: str) -> str:
        with pytest.raises(ValueError) as caught:
            schema.parse(config, [], {key: Path("mine.yaml")})
        return str(caught.value)

    rank = refusal({"model": {"rank": "x"}}, "model.rank")
    assert rank == "model.rank in mine.yaml cannot be 'x': expected int."
    rate = {"class_path": "torch.optim.SGD", "init_args": {"lr": "x"}}
    nested = refusal({"model": {"optimizer": rate}}, "model.optimizer")
    assert nested == "model.optimizer.lr in mine.yaml cannot be 'x': expected float."
    threads = refusal({"threads": 0}, "threads")
    assert threads == "threads in mine.yaml cannot be 0: expected 1 to 256."
    order = refusal({"order": ["a"]}, "order")
    assert order == "order in mine.yaml cannot be 'a': expected str or int."


def test_the_name_of_a_dataset_is_one_folder() -> None:
    with pytest.raises(ValueError, match=r"--data.name cannot be 'a/b'"):
        Schema(LoRA, ImageFolder).parse({"data": {"root": "x"}}, ["--data.name=a/b"])


def test_help_explains_all_arguments_except_those_of_the_trainer(
    schema: Schema,
) -> None:
    text = schema.help()
    assert "--model.rank" in text
    assert "Rank of every adapter" in text
    assert text.count("--trainer.") < 10
    assert "CONFIG" not in text
    assert "+ " not in text


MEANT = {
    "lr": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "epochs": "max_epochs",
    "num_epochs": "max_epochs",
    "bs": "batch_size",
    "workers": "num_workers",
    "num_tasks": "num_experiences",
    "device": "accelerator",
    "gpus": "devices",
    "output_dir": "results",
}


@pytest.mark.parametrize("strategy", stems_of("strategies"))
def test_a_word_of_other_code_bases_is_answered_with_the_key_of_this_one(strategy: str) -> None:
    pair = resolve(layers(strategy, "toy"))
    for word, meant in MEANT.items():
        with pytest.raises(ValueError, match=f"There is no key {word}. Did you mean {meant}\\?"):
            pair.overridden([f"--{word}", "1"])
        assert pair.overridden([f"--{meant}=cpu" if word == "device" else f"--{meant}=1"])


@pytest.mark.parametrize("strategy", stems_of("strategies"))
def test_the_resolved_config_shows_the_optimizer_with_its_numbers(strategy: str) -> None:
    pair = resolve(layers(strategy, "toy"))
    for words, expected in (
        ([], ("torch.optim.Adam", 1e-3)),
        (["--optimizer.lr=0.3"], ("torch.optim.Adam", 0.3)),
        (["--optimizer=SGD"], ("torch.optim.SGD", 1e-3)),
    ):
        optimizer = pair.overridden(words).resolved["model"]["init_args"]["optimizer"]
        assert (optimizer["class_path"], optimizer["init_args"]["lr"]) == expected


def test_aliases_that_multiply_are_refused_on_the_command_line(schema: Schema) -> None:
    levels = (f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in pairwise("abcdefgh"))
    bomb = f"{{a: &a [x], {', '.join(levels)}}}"
    with pytest.raises(ValueError, match=r"The aliases in --backbone.options stand for [0-9,]+ values"):
        schema.parse({}, [f"--backbone.options={bomb}"])


def test_an_argument_of_the_optimizer_needs_no_group() -> None:
    full = resolve(layers("lora", "toy"), ["--model.optimizer.lr", "0.3"])
    assert resolve(layers("lora", "toy"), ["--optimizer.lr", "0.3"]).hash == full.hash
