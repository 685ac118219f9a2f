"""Exported files against the predictions that the run itself has kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from cl_bench import __main__ as cli
from cl_bench.artifacts.predictions import read
from cl_bench.export.command import Written, export
from cl_bench.export.folding import merged
from cl_bench.export.loading import load
from cl_bench.network.backbones import Backbone
from cl_bench.run.configuration import Configuration

LOW_RANK = ("lora", "inflora", "keeplora", "loda", "janus_lora")


@pytest.fixture(scope="module")
def exported(
    kept: Callable[..., Configuration], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Configuration, Path, Written]]:
    """Exports a method on toy, once; returns its configuration, the folder and what was written."""

    @cache
    def written(method: str) -> tuple[Configuration, Path, Written]:
        configuration = kept(method, *(["--rank=2"] if method in LOW_RANK else []))
        folder = tmp_path_factory.mktemp(method)
        return configuration, folder, export(configuration.folder, folder)

    return written


def predicted(model: Any, configuration: Configuration, config: dict[str, Any]) -> list[int]:
    """Return the classes that a model of timm predicts for the test images of toy, in their order."""
    source = configuration.datamodule.found.test
    pixels = torch.stack([source[index][0] for index in range(len(source))]) / 255
    mean, std = (torch.tensor(config["pretrained_cfg"][name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        found: list[int] = model.eval()((pixels - mean) / std).argmax(dim=1).tolist()
    return found


def kept_predictions(configuration: Configuration) -> list[int]:
    table = read(configuration.folder)
    listed: list[int] = table[table["after"] == table["after"].max()]["prediction"].tolist()
    return listed


@pytest.mark.parametrize("method", (*LOW_RANK, "linear_probe", "ncm", "slca"))
def test_plain_timm_predicts_what_the_run_predicted_image_by_image(
    exported: Callable[[str], tuple[Configuration, Path, Written]], method: str
) -> None:
    configuration, folder, _ = exported(method)
    config = json.loads((folder / "config.json").read_text())
    made = timm.create_model(
        config["architecture"],
        num_classes=config["num_classes"],
        checkpoint_path=str(folder / "model.safetensors"),
        **config["model_args"],
    )
    assert predicted(made, configuration, config) == kept_predictions(configuration)
    found = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert predicted(found, configuration, config) == kept_predictions(configuration)


@pytest.mark.parametrize("method", LOW_RANK)
def test_the_adapter_on_pretrained_weights_predicts_the_same(
    exported: Callable[[str], tuple[Configuration, Path, Written]], method: str
) -> None:
    """PEFT is not at hand: the file is read here by its documented names, with W + alpha / r B A."""
    configuration, folder, _ = exported(method)
    config = json.loads((folder / "config.json").read_text())
    options = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    state = safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")
    model = timm.create_model(
        config["architecture"], num_classes=config["num_classes"], **config["model_args"]
    )
    pretrained = merged(Backbone(**configuration._arguments("backbone")))
    model.load_state_dict(pretrained, strict=False)
    for layer in options["target_modules"]:
        weight = model.get_submodule(layer).weight.data
        down = state.pop(f"base_model.model.{layer}.lora_A.weight")
        up = state.pop(f"base_model.model.{layer}.lora_B.weight")
        assert len(down) == options["rank_pattern"][layer] <= options["r"]
        weight += options["alpha_pattern"][layer] / options["rank_pattern"][layer] * up @ down
    assert options["modules_to_save"] == ["head"]
    for leaf in ("weight", "bias"):
        getattr(model.head, leaf).data = state.pop(f"base_model.model.head.{leaf}")
    assert not state
    assert predicted(model, configuration, config) == kept_predictions(configuration)


def test_the_adapter_has_the_rank_of_what_was_learnt(
    exported: Callable[[str], tuple[Configuration, Path, Written]],
) -> None:
    _, folder, _ = exported("lora")
    options = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    # Three experiences, each with a product of rank 2 on the keys and one on the values.
    assert set(options["rank_pattern"].values()) == {3 * 2 * 2}


def test_logits_are_those_of_the_strategy_or_a_notice_is_printed(
    exported: Callable[[str], tuple[Configuration, Path, Written]],
) -> None:
    notice = "The predictions are those of the strategy; the logits have another scale."
    assert notice not in exported("lora")[2].notices
    assert notice in exported("loda")[2].notices


@pytest.mark.parametrize(
    ("words", "reason"),
    (
        (("l2p",), "L2P makes prompts for every image, and timm's transformer has no place for them"),
        (("ease",), "EASE computes logits in a way of its own"),
        (("ranpac", "--random_features=64"), "RidgeHead, does not predict as a linear layer does"),
        (("ranpac", "--random_features=null"), r"computes with blocks\.0\.bottlenecks"),
    ),
)
def test_what_timm_cannot_hold_is_refused_in_a_sentence(
    kept: Callable[..., Configuration], tmp_path: Path, words: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        export(kept(*words).folder, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_model_card_names_method_numbers_commit_and_licence(
    exported: Callable[[str], tuple[Configuration, Path, Written]],
) -> None:
    configuration, folder, _ = exported("loda")
    result = load(configuration.folder).result
    text = (folder / "README.md").read_text()
    assert "# LoDA on toy-T3" in text
    assert f"| `acc/sample` | {result.metrics()['acc/sample']:.2f} | final accuracy over all images" in text
    assert f"protocol `{result.protocol.fingerprint}`" in text
    assert f"| commit | `{result.provenance['commit']}` |" in text
    assert "## Licence\n\nThe weights started at random" in text


def test_the_verb_exports_an_earlier_experience_with_its_classes(
    kept: Callable[..., Configuration], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = str(kept("lora", "--rank=2").folder)
    assert cli.main(["export", cell, "--experience", "2", "--output", str(tmp_path / "second")]) == 0
    assert f"wrote {tmp_path / 'second' / 'model.safetensors'}" in capsys.readouterr().out.replace("\n", "")
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["pretrained_cfg"]["label_names"] == ["spot 0", "spot 1", "spot 2", "spot 3"]
