import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import cl_bench
from cl_bench.artifacts.models import file_of
from cl_bench.artifacts.predictions import read
from cl_bench.export.loading import load
from cl_bench.run.configuration import Configuration


def images(configuration: Configuration) -> list[torch.Tensor]:
    """The test images of toy as the dataset decodes them."""
    source = configuration.datamodule.found.test
    return [source[index][0] for index in range(len(source))]


@pytest.mark.parametrize("experience", (0, 2))
@pytest.mark.parametrize("words", (("lora", "--rank=2"), ("janus_lora", "--rank=2"), ("l2p",), ("ncm",)))
def test_a_loaded_strategy_predicts_what_the_run_predicted_then(
    kept: Callable[..., Configuration], words: tuple[str, ...], experience: int
) -> None:
    configuration = kept(*words)
    loaded = load(configuration.folder, experience)
    table = read(configuration.folder)
    own = table[table["after"] == experience]
    decoded = images(configuration)
    logits = loaded(torch.stack([loaded.transform(decoded[sample]) for sample in own["sample"]]))
    np.testing.assert_allclose(logits, np.stack(own["logits"]), rtol=1e-4, atol=1e-5)
    assert logits.argmax(dim=1).tolist() == own["prediction"].tolist()
    assert not loaded.strategy.training


def test_prediction_names_the_classes_of_decoded_images(kept: Callable[..., Configuration]) -> None:
    configuration = kept("lora", "--rank=2")
    loaded = cl_bench.load(configuration.folder)
    table = read(configuration.folder)
    last = table[table["after"] == 2]
    names = loaded.predict([images(configuration)[sample] for sample in last["sample"]])
    assert names == [f"spot {label}" for label in last["prediction"]]


def test_bf16_is_computed_in_bf16_again(kept: Callable[..., Configuration]) -> None:
    configuration = kept("linear_probe", "--trainer.precision=bf16-mixed")
    loaded, table = load(configuration.folder), read(configuration.folder)
    last = table[table["after"] == 2]
    pixels = torch.stack([loaded.transform(images(configuration)[sample]) for sample in last["sample"]])
    logits = loaded(pixels)
    assert logits.dtype == torch.bfloat16
    np.testing.assert_allclose(logits.float(), np.stack(last["logits"]), rtol=0.02, atol=0.02)


def test_a_joint_run_is_loaded_with_all_its_classes(kept: Callable[..., Configuration]) -> None:
    configuration = kept("lora", "--rank=2", "--regime=joint")
    loaded = load(configuration.folder)
    names = loaded.predict(images(configuration))
    assert names == [f"spot {label}" for label in read(configuration.folder)["prediction"]]


def test_loading_leaves_the_random_numbers_of_the_caller(checkout_of_a_cell: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load(checkout_of_a_cell)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_experience_without_a_model_is_refused_with_those_that_have_one(
    checkout_of_a_cell: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkout_of_a_cell, tmp_path / "cell"))
    file_of(folder, 1).unlink()
    with pytest.raises(FileNotFoundError, match=r"no model after experience 1, .* choose among 0, 2"):
        load(folder, 1)
    shutil.rmtree(folder / "models")
    with pytest.raises(FileNotFoundError, match="run its cell again with --keep model"):
        load(folder)


def test_the_model_of_another_cell_is_refused(kept: Callable[..., Configuration], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kept("lora", "--rank=2").folder, tmp_path / "cell"))
    shutil.copy(file_of(kept("ncm").folder, 2), file_of(folder, 2))
    with pytest.raises(ValueError, match=r"is of Origin.*and this cell has Origin"):
        load(folder)


def test_the_config_of_another_cell_is_refused(kept: Callable[..., Configuration], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kept("lora", "--rank=2").folder, tmp_path / "cell"))
    shutil.copy(kept("ncm").folder / "config.yaml", folder)
    with pytest.raises(ValueError, match=r"is of the cell .*, and its result of"):
        load(folder)


def test_no_code_in_the_folder_of_a_cell_is_run(checkout_of_a_cell: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkout_of_a_cell, tmp_path / "cell"))
    (folder / "hidden_in_a_cell.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Hidden: pass")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["class_path"] = "hidden_in_a_cell.Hidden"
    config["code"] = [str(folder)]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    path = list(sys.path)
    with pytest.raises(ValueError, match="If you trust its class, make it importable"):
        load(folder)
    assert sys.path == path
    assert not (tmp_path / "ran").exists()


def test_importing_the_package_imports_no_torch(checkout: Path) -> None:
    code = "import cl_bench, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=checkout, check=False).returncode == 0
