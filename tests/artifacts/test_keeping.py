from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cl_bench import __main__ as cli
from cl_bench.artifacts import predictions
from cl_bench.artifacts.keeping import KeptPredictions
from cl_bench.data.sources import Sources
from cl_bench.loop.checkpoint import Checkpoints
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.network.backbones import Backbone
from cl_bench.results.result import FILE_NAME
from cl_bench.results.result import read as read_result
from cl_bench.run.configuration import Configuration, layers, resolve
from cl_bench.run.run import RunFailed, finished, quiet, run
from datamodules.toy import Toy
from strategies.ncm import NearestClassMean


def toy(folder: Path, *words: str, method: str = "lora") -> Configuration:
    return resolve(layers(method, "toy"), [f"--results={folder}", "--trainer.accelerator=cpu", *words])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Configuration:
    """A cell that has run without a break and kept everything."""
    configuration = toy(tmp_path_factory.mktemp("whole"), "--keep=all", "--keep_logits")
    with quiet():
        run(configuration)
    return configuration


def kept_files(folder: Path) -> dict[str, bytes]:
    """Return the content of all that a cell has kept, by path in its folder."""
    files = (path for name in ("models", "predictions") for path in (folder / name).iterdir())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def interrupt(monkeypatch: pytest.MonkeyPatch, configuration: Configuration, number: int) -> None:
    """Run a cell that fails when it is about to write checkpoint ``number``; an experience writes four."""
    left = iter(range(number - 1))
    write = Checkpoints.write

    def interrupted(self: Checkpoints, checkpoint: Any) -> Path:
        if next(left, None) is None:
            raise OSError("no space left")
        return write(self, checkpoint)

    with monkeypatch.context() as patch, pytest.raises(RunFailed), quiet():
        patch.setattr(Checkpoints, "write", interrupted)
        run(configuration)


@pytest.mark.parametrize(
    "words",
    (("lora", "--order=numpy:3"), ("ncm", "--test_batch_size=5"), ("lora", "--regime=joint")),
    ids=" ".join,
)
def test_metrics_of_kept_predictions_are_those_of_the_counts(tmp_path: Path, words: tuple[str, ...]) -> None:
    method, *options = words
    configuration = toy(tmp_path, "--keep=predictions", *options, method=method)
    with quiet():
        result = run(configuration)
    table = predictions.read(configuration.folder)
    counted = replace(result, rows=predictions.rows(table, result))
    assert counted.metrics() == pytest.approx(result.metrics(), abs=0, nan_ok=True)
    assert not (configuration.folder / "models").exists()


def test_a_sample_is_the_place_of_its_image_in_the_dataset(tmp_path: Path) -> None:
    configuration = toy(tmp_path, "--keep=predictions", "--order=[5,3,1,0,2,4]", "--test_batch_size=5")
    with quiet():
        run(configuration)
    table = predictions.read(configuration.folder)
    order = np.array([5, 3, 1, 0, 2, 4])
    original = np.array(configuration.datamodule.found.test.targets)
    assert (order[table["label"]] == original[table["sample"]]).all()
    assert not table.duplicated(["after", "sample"]).any()
    assert table.groupby("after").size().tolist() == [12, 24, 36]


def test_the_five_largest_logits_and_the_probability_are_those_of_the_logits(whole: Configuration) -> None:
    table = predictions.read(whole.folder)
    last = table[table["after"] == 2]
    logits = np.stack(last["logits"]).astype(np.float64)
    assert (np.stack(last["top5"]) == np.argsort(-logits, axis=1, kind="stable")[:, :5]).all()
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(last["probability"], shares.max(axis=1), rtol=1e-5)
    assert [len(one) for one in table[table["after"] == 0]["top5"]] == [2] * 12


class InDomains(Toy):
    """Toy whose test images come from two domains in turn."""

    def sources(self) -> Sources:
        found = super().sources()
        train, test = ([place % 2 for place in range(len(part))] for part in (found.train, found.test))
        return replace(found, domains=("photo", "sketch"), train_domains=train, test_domains=test)


def test_the_domain_of_every_image_is_kept(tmp_path: Path, tiny_backbone: Callable[..., Backbone]) -> None:
    trainer = StreamTrainer(max_epochs=1, accelerator="cpu", callbacks=[KeptPredictions(tmp_path)])
    stream = InDomains(num_experiences=3, image_size=8, test_batch_size=5)
    with quiet():
        trainer.run(NearestClassMean(tiny_backbone()), stream, folder=tmp_path)
    table = predictions.read(tmp_path)
    assert (table["domain"] == table["sample"] % 2).all()
    assert predictions.accuracies(table, "domain").shape == (3, 2)


@pytest.mark.parametrize("number", (5, 8), ids=("after an evaluation", "after a merge"))
def test_a_resumed_run_ends_with_the_files_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Configuration, number: int
) -> None:
    cut = toy(tmp_path, "--keep=all", "--keep_logits")
    interrupt(monkeypatch, cut, number)
    with quiet():
        assert run(cut).provenance["resumed"]
    files = kept_files(cut.folder)
    assert len(files) == 6
    assert files == kept_files(whole.folder)


def test_a_run_started_without_keeping_is_not_resumed_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, toy(tmp_path), 6)
    with quiet(), pytest.raises(RunFailed, match="started without keeping its predictions"):
        run(toy(tmp_path, "--keep=predictions"))
    with quiet():
        run(toy(tmp_path, "--keep=predictions", "--resume=false"))
    assert len(predictions.read(toy(tmp_path).folder)) == 12 + 24 + 36


def test_what_an_abandoned_attempt_has_kept_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, toy(tmp_path, "--keep=all"), 6)
    with quiet():
        run(toy(tmp_path, "--resume=false"))
    folder = toy(tmp_path).folder
    assert not (folder / "models").exists()
    assert not (folder / "predictions").exists()


def test_a_finished_cell_without_what_is_asked_for_is_refused_and_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configuration = toy(tmp_path, "--keep=predictions")
    with quiet():
        run(configuration)
    path = configuration.folder / FILE_NAME
    before = path.read_bytes()
    for words, absent in ((["--keep=model"], "models"), (["--keep=predictions", "--keep_logits"], "logits")):
        with pytest.raises(ValueError, match=f"is done and has kept no {absent}, which only a run can keep"):
            finished(toy(tmp_path, *words))
        assert cli.main(["run", "lora", "toy", "--results", str(tmp_path), *words]) == cli.REFUSED
        assert "choose other --results, remove the folder" in capsys.readouterr().err
    assert finished(toy(tmp_path, "--keep=predictions")) == finished(toy(tmp_path)) == path
    assert path.read_bytes() == before


def test_a_grid_that_keeps_is_refused_before_a_cell_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "kept.yaml"
    grid.write_text("{strategies: [lora, ncm], datasets: [toy], common: {keep: predictions}}")
    with quiet():
        run(toy(tmp_path / "results"))
    assert cli.main(["grid", str(grid), "--results", str(tmp_path / "results")]) == cli.REFUSED
    assert "has kept no predictions" in capsys.readouterr().err
    assert len([*(tmp_path / "results").rglob(FILE_NAME)]) == 1


def test_keeping_changes_neither_the_cell_nor_its_counts(tmp_path: Path, whole: Configuration) -> None:
    plain = toy(tmp_path)
    assert plain.hash == whole.hash
    with quiet():
        assert run(plain).rows == read_result(whole.folder / FILE_NAME).rows


def test_logits_without_predictions_are_refused_before_training(tmp_path: Path) -> None:
    with quiet(), pytest.raises(ValueError, match="add --keep predictions, or --keep all"):
        run(toy(tmp_path, "--keep_logits"))
