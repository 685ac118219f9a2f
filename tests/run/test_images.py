"""Results and checkpoints are taken up only if they are of the images that the dataset has now."""

import sys
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from cl_bench.__main__ import main
from cl_bench.loop.checkpoint import Refused
from cl_bench.loop.provenance import file_hashes
from cl_bench.results.result import FILE_NAME
from cl_bench.run.configuration import Configuration, layers, resolve
from cl_bench.run.run import RunFailed, run
from cl_bench.run.tracking import wandb_id

CONFIG = """
data:
  class_path: datamodules.image_folder.ImageFolder
  init_args: {num_experiences: 2, image_size: 16, batch_size: 8}
backbone:
  model: vision_transformer
  weights: random
  options: {img_size: 16, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}
  normalisation: half
trainer: {max_epochs: 1, accelerator: cpu}
"""


def images(root: Path, number: int = 2) -> Path:
    """Write ``number`` images of each of four classes for training, and one for testing."""
    for split, count in (("train", number), ("test", 1)):
        for label in range(4):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (16, 16), (60 * label, 50 * i, 0)).save(folder / f"{i}.png")
    return root


def cell(tmp_path: Path, root: Path, *words: str) -> Configuration:
    (tmp_path / "small.yaml").write_text(CONFIG)
    overrides = [f"--root={root}", f"--results={tmp_path / 'results'}", *words]
    return resolve(layers("ncm", str(tmp_path / "small.yaml")), overrides)


def command(tmp_path: Path, root: Path) -> list[str]:
    return ["run", "ncm", str(tmp_path / "small.yaml"), f"--root={root}", f"--results={tmp_path / 'results'}"]


def test_a_result_of_another_dataset_under_the_same_name_is_not_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = images(tmp_path / "one" / "data"), images(tmp_path / "two" / "data", number=3)
    first = cell(tmp_path, one)
    assert cell(tmp_path, two).hash == first.hash
    run(first)
    assert main(command(tmp_path, one)) == 0
    assert "already done" in capsys.readouterr().out
    for words in (
        command(tmp_path, two),
        ["grid", str(tmp_path / "grid.yaml"), "--dry-run"],
    ):
        (tmp_path / "grid.yaml").write_text(
            f"{{strategies: [ncm], datasets: [{tmp_path}/small.yaml], results: {tmp_path}/results, "
            f"common: {{root: {two}}}}}"
        )
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"{FILE_NAME} is of other training images than {two} has now: name this dataset" in error
    assert main([*command(tmp_path, two), "--name=other"]) == 0
    with pytest.raises(ValueError, match="is of other training images"):
        run(cell(tmp_path, two))


def test_a_result_is_served_where_its_images_are_not(tmp_path: Path) -> None:
    first = cell(tmp_path, images(tmp_path / "data"))
    run(first)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert main(command(tmp_path, tmp_path / "data")) == 0


def test_an_image_replaced_under_its_name_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = images(tmp_path / "data")
    run(cell(tmp_path, root))
    Image.effect_noise((16, 16), 50).save(root / "test" / "class3" / "0.png")
    assert main(command(tmp_path, root)) == 2
    assert "is of images with other sizes in bytes than" in capsys.readouterr().err


def test_an_image_replaced_by_one_of_its_size_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = images(tmp_path / "data")
    (root / "test" / "class3" / "0.png").unlink()
    replaced = root / "test" / "class3" / "0.bmp"
    Image.new("RGB", (16, 16), (180, 0, 0)).save(replaced)
    size = replaced.stat().st_size
    done = run(cell(tmp_path, root))
    Image.new("RGB", (16, 16), (180, 0, 1)).save(replaced)
    assert replaced.stat().st_size == size
    assert main(command(tmp_path, root)) == 2
    assert "is of images with other bytes than" in capsys.readouterr().err
    # A result from before the hash of bytes is still compared by sizes, which are equal.
    del done.provenance["ends_sha256"]
    done.write(cell(tmp_path, root).folder)
    assert main(command(tmp_path, root)) == 0


def test_the_last_bytes_of_a_large_file_count(tmp_path: Path) -> None:
    stream = cell(tmp_path, images(tmp_path / "data")).datamodule
    large = tmp_path / "data" / "test" / "class3" / "0.png"
    found = []
    for last in (b"a", b"b"):
        large.write_bytes(200_000 * b"-" + last)
        found.append(file_hashes(stream))
    assert found[0]["sizes_sha256"] == found[1]["sizes_sha256"]
    assert found[0]["ends_sha256"] != found[1]["ends_sha256"]


OWN = """
import numpy as np
import torch
from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.data.sources import ArraySource, Sources
from cl_bench.data.views import floats

class OwnFolder(StreamDataModule):
    name = "own"

    def __init__(self, *, folder: str, **kwargs):
        super().__init__(**kwargs)
        self.folder = folder

    def sources(self):
        images = torch.from_numpy(np.load(f"{self.folder}/images.npy"))
        source = ArraySource(images, [0, 1, 2, 3])
        return Sources(source, source, list("abcd"))

    def train_transform(self):
        return floats()

    test_transform = train_transform
"""


def test_own_data_without_a_root_are_compared_by_what_they_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "own_folder", None)
    del sys.modules["own_folder"]
    (tmp_path / "own_folder.py").write_text(OWN)
    (tmp_path / "own.yaml").write_text(
        CONFIG.replace("datamodules.image_folder.ImageFolder", "own_folder.OwnFolder").replace(
            "init_args: {", f"init_args: {{folder: {tmp_path}, "
        )
    )
    words = ["run", "ncm", str(tmp_path / "own.yaml"), f"--results={tmp_path / 'results'}"]
    pictures = np.zeros((4, 3, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pictures)
    assert main(words) == 0
    assert main(words) == 0
    np.save(tmp_path / "images.npy", pictures + 1)
    assert main(words) == 2
    assert "is of other training images than own has now" in capsys.readouterr().err


class Fails(Callback):
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise ArithmeticError


def test_a_run_does_not_resume_on_images_that_have_changed(tmp_path: Path) -> None:
    root = images(tmp_path / "data")
    interrupted = cell(tmp_path, root)
    with pytest.raises(RunFailed):
        run(interrupted, [Fails()])
    (root / "train" / "class0" / "1.png").unlink()
    with pytest.raises(Refused, match=r"with other training images .* with --resume=false"):
        run(cell(tmp_path, root))
    assert run(cell(tmp_path, root, "--resume=false")).status == "done"


def test_runs_on_different_images_have_different_ids_in_wandb(tmp_path: Path) -> None:
    ids = []
    for name, number in (("one", 2), ("two", 3)):
        configuration = cell(tmp_path, images(tmp_path / name / "data", number))
        configuration.datamodule.setup("fit")
        ids.append(wandb_id(configuration))
    assert ids[0] != ids[1]
