import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from PIL import Image

from cl_bench.__main__ import main
from cl_bench.loop.callbacks import StreamMetrics
from cl_bench.results.result import FILE_NAME, read

THROW_AWAY = '''
from torch import Tensor

from cl_bench.contracts.strategy import Strategy


class Sharpened(Strategy):
    """A linear probe whose loss sees doubled features.

    Args:
        backbone: Pre-trained vision transformer.
        factor: Factor of the features.
        kwargs: Settings of every strategy.
    """

    name = "sharpened probe"

    def __init__(self, backbone, *, factor: float = 2.0, **kwargs):
        super().__init__(backbone, **kwargs)
        self.factor = factor

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        return super().loss(self.factor * features, labels)
'''


def run(folder: Path, *words: str) -> int:
    return main(["run", *words, "--results", str(folder), "--trainer.accelerator", "cpu"])


def losses(result: Path) -> list[str]:
    """Return the mean training loss of every epoch, to the last digit."""
    with (result.parent / "curves" / "metrics.csv").open() as curves:
        return [row["train/loss_epoch"] for row in csv.DictReader(curves) if row["train/loss_epoch"]]


def only_result(folder: Path) -> Path:
    (path,) = folder.rglob(FILE_NAME)
    return path


def test_a_run_writes_counts_config_and_curves_to_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "lora", "toy", "--seed", "1") == 0
    path = only_result(tmp_path)
    assert path.parent.parent == tmp_path / "toy-T3" / "lora"
    assert path.parent.name.startswith("identity-seed1-")
    assert {file.name for file in path.parent.iterdir()} == {FILE_NAME, "config.yaml", "curves"}
    header = (path.parent / "curves" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"stream/experience", "stream/acc/sample", "train/loss_epoch", "step"} <= set(header)
    printed = capsys.readouterr().out
    assert "LoRA on toy-T3" in printed
    assert printed.count("accuracy over") == 3
    assert str(path) in printed


def test_the_same_command_gives_the_same_counts_and_a_done_cell_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["lora", "toy", "--seed", "1", "--max_epochs", "3", "--model.optimizer.lr", "0.01"]
    for folder in (tmp_path / "one", tmp_path / "two"):
        assert run(folder, *words) == 0
    one, two = (only_result(tmp_path / name) for name in ("one", "two"))
    assert read(one).rows == read(two).rows
    assert losses(one) == losses(two)
    capsys.readouterr()
    before = one.stat().st_mtime_ns
    assert run(tmp_path / "one", *words) == 0
    assert "already done" in capsys.readouterr().out
    assert one.stat().st_mtime_ns == before


def test_a_changed_setting_has_its_own_folder(tmp_path: Path) -> None:
    for rank in ("2", "3"):
        assert run(tmp_path, "lora", "toy", "--rank", rank) == 0
    assert len(list(tmp_path.rglob(FILE_NAME))) == 2


def test_the_printed_config_runs_from_a_file_as_the_same_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["ncm", "toy", "--order", "numpy:1993", "--seed", "4"]
    assert run(tmp_path / "results", *words, "--print_config") == 0
    saved = tmp_path / "saved.yaml"
    saved.write_text(capsys.readouterr().out)
    assert main(["run", str(saved)]) == 0
    assert run(tmp_path / "results", *words) == 0
    assert "already done" in capsys.readouterr().out


def test_a_new_strategy_is_one_file_and_one_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "throw_away_strategy.py").write_text(THROW_AWAY)
    config = tmp_path / "mine.yaml"
    config.write_text("model: {class_path: throw_away_strategy.Sharpened, init_args: {factor: 3}}")
    assert main(["run", str(config), "toy", "--results", str(tmp_path / "results")]) == 0
    assert capsys.readouterr().err == ""
    result = read(only_result(tmp_path))
    assert (result.strategy, result.status) == ("sharpened probe", "done")
    assert result.config["model"]["init_args"]["factor"] == 3.0


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in printed.out
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["lroa", "toy"], "There is no config 'lroa' among strategies. Did you mean lora?"),
        (["lora", "digit"], "There is no config 'digit' among datamodules. Did you mean digits?"),
        (["lora"], "Name one strategy and one dataset"),
        (["lora", "toy", "--rank", "two"], "--model.rank cannot be 'two': expected int."),
        (["lora", "toy", "--rank", "1000"], "An adapter of rank 1000 does not fit"),
        (["lora", "toy", "--targets", "[k, w]"], "There is no adapter target 'w'"),
        (["lora", "toy", "--num_experiences", "4"], "6 classes cannot be dealt evenly into 4 experiences"),
        (["lora", "toy", "--order", "nmpy:3"], "numpy"),
        (["lora", "toy", "--order", "[0, 0, 1, 2, 3, 4]"], "order"),
        (
            ["lora", "toy", "--backbone.weights", "absent.safetensors"],
            "There is no weights file absent.safetensors",
        ),
        (["lora", "toy", "--image_size", "32"], "takes images of 16 pixels and the datamodule gives 32"),
        (["lora", "toy", "--targets", "[]"], "No adapter target is named"),
        (["lora", "toy", "--trainer.fast_dev_run", "true"], "fast_dev_run would change that"),
        (["lora", "image_folder", "--num_experiences", "2"], "root"),
        (["lora", "image_folder", "--num_experiences", "2", "--root", "absent"], "absent"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert run(tmp_path, *words) == 2
    assert sentence in refusal(capsys)
    assert not list(tmp_path.rglob(FILE_NAME))


@pytest.mark.parametrize("flags", [[], ["--print_protocol"]])
def test_missing_data_are_reported_before_weights_are_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    absent = ["--root", str(tmp_path / "absent"), "--backbone.weights", str(tmp_path / "weights.safetensors")]
    (tmp_path / "weights.safetensors").write_bytes(b"no weights")
    assert main(["run", "lora", "imagenet_r", *absent, "--results", str(tmp_path), *flags]) == 2
    assert refusal(capsys).startswith(f"The folder {tmp_path / 'absent'} does not exist: fetch the data with")


def images(root: Path, *, classes: int = 4, size: int = 16) -> Path:
    for split, count in (("train", 3), ("test", 2)):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (size, size), (60 * label, 40 * index, 90)).save(folder / f"{index}.png")
    return root


SMALL = [
    "--backbone.model=vision_transformer",
    "--backbone.weights=random",
    "--backbone.options={img_size: 16, patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}",
    "--image_size=16",
    "--num_experiences=2",
    "--max_epochs=1",
]


def test_a_users_own_images_run_from_their_folder(tmp_path: Path) -> None:
    root = images(tmp_path / "birds")
    assert run(tmp_path / "results", "linear_probe", "image_folder", "--root", str(root), *SMALL) == 0
    result = read(only_result(tmp_path))
    assert (result.dataset, result.num_experiences, result.test_images) == ("birds", 2, [2, 2, 2, 2])


def test_an_unreadable_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = images(tmp_path / "birds")
    broken = root / "train" / "class1" / "1.png"
    broken.write_text("no picture")
    status = run(tmp_path / "results", "linear_probe", "image_folder", "--root", str(root), *SMALL)
    error = capsys.readouterr().err
    assert status != 0
    assert f"below {root} cannot be read, such as {broken.relative_to(root)}" in error
    assert "Traceback" not in error


def test_an_empty_class_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = images(tmp_path / "birds")
    for file in (root / "train" / "class2").iterdir():
        file.unlink()
    assert run(tmp_path / "results", "linear_probe", "image_folder", "--root", str(root), *SMALL) == 2
    assert "class2" in refusal(capsys)


def test_the_error_of_weights_with_another_shape_names_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    from cl_bench.network.backbones import Backbone

    options = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2}
    save_file(
        Backbone("vision_transformer", "random", options).vit.state_dict(), tmp_path / "wide.safetensors"
    )
    assert run(tmp_path, "lora", "toy", "--backbone.weights", str(tmp_path / "wide.safetensors")) == 2
    assert "embed_dim" in refusal(capsys)


def test_a_results_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert run(tmp_path / "file", "lora", "toy") == 2
    assert "choose another with --results" in refusal(capsys)


def test_a_diverged_run_suggests_a_remedy_and_keeps_its_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e38"]
    assert run(tmp_path, "lora", "toy", *huge, "--max_epochs", "3") == 1
    assert "lower the learning rate" in capsys.readouterr().err
    path = only_result(tmp_path)
    assert read(path).status == "diverged"
    assert "Traceback" in (path.parent / "error.txt").read_text()


def test_a_cell_with_an_unreadable_result_runs_again(tmp_path: Path) -> None:
    assert run(tmp_path, "ncm", "toy") == 0
    path = only_result(tmp_path)
    path.write_text("broken")
    assert run(tmp_path, "ncm", "toy") == 0
    assert read(path).status == "done"


def test_a_missing_accelerator_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("This machine has the accelerator that must be missing here.")
    assert main(["run", "ncm", "toy", "--results", str(tmp_path), "--trainer.accelerator", "gpu"]) == 2
    assert "MisconfigurationException: " in refusal(capsys)


@pytest.mark.parametrize(
    "words", (["--help"], *([verb, "--help"] for verb in ("run", "check", "grid", "report", "prepare")))
)
def test_help_is_short_enough_to_read(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main(words) == 0
    except SystemExit as end:  # argparse
        assert end.code == 0
    text = capsys.readouterr().out
    assert 5 < len(text.splitlines()) < 30
    assert "cl-bench" in text


def test_help_for_a_pair_lists_the_arguments_of_that_pair(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "lora", "digits", "--help"]) == 0
    text = capsys.readouterr().out
    for key in (
        "--model.rank",
        "--model.variant {merge,shared}",
        "--data.batch_size",
        "--backbone.weights",
        "--seed",
    ):
        assert key in text


def test_diagnostics_fill_the_result_and_the_curves_of_the_same_cell(tmp_path: Path) -> None:
    words = ["lora", "toy", "--num_classes", "8", "--held_out_classes", "2"]
    for folder, flags in ((tmp_path / "without", []), (tmp_path / "with", ["--diagnostics"])):
        assert run(folder, *words, *flags) == 0
    without, watched = (only_result(tmp_path / name) for name in ("without", "with"))
    assert without.parent.name == watched.parent.name
    assert read(without).rows == read(watched).rows
    assert losses(without) == losses(watched)
    assert read(without).diagnostics == []
    assert [list(entry["violation"]) for entry in read(watched).diagnostics] == [[], ["k", "v"], ["k", "v"]]
    assert "diagnostics" in read(watched).costs[0].seconds
    header = (watched.parent / "curves" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"diagnostics/violation/k/relative", "diagnostics/danger_score", "retention/held_out_ncm"} <= set(
        header
    )


def test_wandb_files_hold_curves_with_the_experience_as_step(
    tmp_path: Path, wandb_records: Callable[[Path], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # W&B keeps the settings of its first run
    assert run(tmp_path, "lora", "toy", "--wandb") == 0
    wandb.teardown()  # otherwise its own process may still be writing
    folder = only_result(tmp_path).parent
    (kept,) = folder.glob("wandb/offline-run-*")
    records = wandb_records(kept)
    history = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    rows = [row for row in history if "stream/experience" in row]
    assert [row["stream/experience"] for row in rows] == [1, 2, 3]
    final = read(only_result(tmp_path)).metrics()
    assert rows[-1]["stream/acc/sample"] == pytest.approx(final["acc/sample"])
    (start,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (start.run_group, start.job_type, start.project) == ("toy-T3", "lora", "cl-bench")
    steps = {
        record.metric.glob_name: record.metric.step_metric
        for record in records
        if record.WhichOneof("record_type") == "metric"
    }
    assert steps["stream/*"] == "stream/experience"
    summary = {
        "/".join(item.nested_key) or item.key: json.loads(item.value_json)
        for record in records
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert summary["final/acc/sample"] == pytest.approx(final["acc/sample"])
    assert summary["cost/seconds"] > 0
    config = {
        item.key
        for record in records
        if record.WhichOneof("record_type") == "config"
        for item in record.config.update
    }
    assert {"label", "benchmark", "fingerprint"} <= config
    assert len([*folder.glob("wandb/offline-run-*/files/media/table/accuracy_matrix*.json")]) == 1


def test_a_resumed_run_continues_its_wandb_run(
    tmp_path: Path, wandb_records: Callable[[Path], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def power_cut(metrics: StreamMetrics, *_: Any) -> None:
        if len(metrics.result.rows) == 1:
            raise ArithmeticError("power cut")
        on_test_start(metrics, *_)

    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    on_test_start = StreamMetrics.on_test_start
    with monkeypatch.context() as patched:
        patched.setattr(StreamMetrics, "on_test_start", power_cut)
        assert run(tmp_path, "lora", "toy", "--wandb") == 1
    assert run(tmp_path, "lora", "toy", "--wandb") == 0
    wandb.teardown()
    ids, experiences = [], []
    for folder in sorted(only_result(tmp_path).parent.glob("wandb/offline-run-*"), key=os.path.getmtime):
        for record in wandb_records(folder):
            ids += [record.run.run_id] if record.WhichOneof("record_type") == "run" else []
            names = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            experiences += [names["stream/experience"]] if "stream/experience" in names else []
    assert len(ids) == 2
    assert len(set(ids)) == 1
    assert [float(value) for value in experiences] == [1, 2, 3]
