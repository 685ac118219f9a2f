"""A real offline run of W&B with TensorBoard beside it, read back from the files that it leaves."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch import LightningModule

from cl_bench.__main__ import main
from cl_bench.results.result import FILE_NAME, read
from cl_bench.run.configuration import layers, resolve
from cl_bench.run.tracking import GradientNorm, how_to_read

OPTIONS = [
    "--wandb",
    "--wandb_tags=[pilot,cpu]",
    "--wandb_group=ours",
    "--wandb_name=first try",
    "--wandb_project=rates",
    "--wandb_entity=team",
    "--tensorboard",
    "--keep=predictions",
    "--trainer.log_every_n_steps=1",
    "--trainer.max_epochs=2",
    "--scheduler=StepLR",
    "--scheduler.step_size=1",
]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a cell that was logged to both, and what its run printed."""
    root = tmp_path_factory.mktemp("tracked")
    wandb.teardown()  # W&B keeps the settings of its first run
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        with (root / "printed").open("w") as output:
            patch.setattr(sys, "stdout", output)
            assert main(["run", "lora", "toy", "--results", str(root), *OPTIONS]) == 0
    wandb.teardown()  # otherwise its own process may still be writing
    (path,) = root.rglob(FILE_NAME)
    return path.parent, (root / "printed").read_text()


def _of_kind(records: list[Any], kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def _history(records: list[Any]) -> list[tuple[str, float]]:
    """Return every value that was logged, with its name."""
    items = (item for row in _of_kind(records, "history") for item in row.item)
    return [("/".join(item.nested_key) or item.key, json.loads(item.value_json)) for item in items]


@pytest.fixture(scope="module")
def records(printed: tuple[Path, str], wandb_records: Callable[[Path], list[Any]]) -> list[Any]:
    (folder,) = printed[0].glob("wandb/offline-run-*")
    return wandb_records(folder)


def test_the_run_prints_the_line_that_sends_it(printed: tuple[Path, str]) -> None:
    folder, text = printed
    (line,) = (line for line in text.splitlines() if line.startswith("  wandb sync "))
    (kept,) = shlex.split(line)[2:]
    assert list(Path(kept).parent.iterdir()) != []
    assert len([*Path(kept).glob("run-*.wandb")]) == 1
    assert f"tensorboard --logdir {folder / 'tensorboard'}" in text


def test_many_runs_are_sent_by_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "my results"
    words = ["--wandb", f"--results={folder}"]
    cells = [resolve(layers("ncm", "toy"), [*words, f"--seed={seed}"]) for seed in (1, 2)]
    assert how_to_read(cells) == []  # online, or not yet run
    for cell in cells:
        (cell.folder / "wandb" / "offline-run-1-a").mkdir(parents=True)
    (text,) = how_to_read(cells)
    assert text.startswith("W&B is offline, and 2 runs are below")
    (line,) = (line for line in text.splitlines() if line.startswith("  wandb sync "))
    (pattern,) = shlex.split(line)[2:]
    assert len([*folder.parent.glob(str(Path(pattern).relative_to(folder.parent)))]) == 2


def test_options_set_project_team_group_name_and_tags(records: list[Any]) -> None:
    (start,) = _of_kind(records, "run")
    assert (start.entity, start.project, start.run_group, start.display_name) == (
        *("team", "rates"),
        *("ours", "first try"),
    )
    assert sorted(start.tags) == ["cpu", "pilot"]


def test_learning_rates_follow_the_schedule_and_gradients_have_a_norm(records: list[Any]) -> None:
    history = _history(records)
    rates = [value for name, value in history if name.startswith("lr-")]
    assert {round(rate / max(rates), 9) for rate in rates} == {1.0, 0.1}  # StepLR: a tenth after an epoch
    norms = [value for name, value in history if name == "train/grad_norm"]
    assert len(norms) == len([name for name, _ in history if name == "train/loss_step"])
    assert all(norm > 0 for norm in norms)
    steps = {metric.glob_name: metric.step_metric for metric in _of_kind(records, "metric")}
    assert steps["lr-*"] == steps["train/*"] == "trainer/global_step"


def test_matrix_and_confusions_are_tables_and_pictures(printed: tuple[Path, str]) -> None:
    media = next(printed[0].glob("wandb/offline-run-*")) / "files" / "media"
    for name in ("accuracy_matrix", "confusion_experiences", "confusion_classes"):
        assert len([*media.glob(f"images/{name}_picture_*.png")]) == 1
    (path,) = media.glob("table/confusion_experiences_*.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["truth", "prediction", "images"]
    result = read(printed[0] / FILE_NAME)
    assert sum(images for _, _, images in table["data"]) == sum(result.test_images)
    placed = sum(images for truth, prediction, images in table["data"] if truth == prediction)
    assert 100 * placed / sum(result.test_images) == pytest.approx(result.metrics()["task_id/sample"])


def test_tensorboard_has_the_curves_of_the_csv_file(printed: tuple[Path, str]) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, _ = printed
    found = events.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    last = found.Scalars("stream/acc/sample")[-1].value
    assert last == pytest.approx(read(folder / FILE_NAME).metrics()["acc/sample"])
    assert {"train/grad_norm", "train/loss_step"} <= set(found.Tags()["scalars"])


def test_the_norm_is_that_of_all_gradients_together(monkeypatch: pytest.MonkeyPatch) -> None:
    module = LightningModule()
    for name, gradient in (("a", [3.0]), ("b", [0.0, 4.0])):
        parameter = torch.nn.Parameter(torch.zeros(len(gradient)))
        parameter.grad = torch.tensor(gradient)
        module.register_parameter(name, parameter)
    module.register_parameter("frozen", torch.nn.Parameter(torch.ones(2), requires_grad=False))
    logged: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(module, "log", logged.__setitem__)
    GradientNorm().on_before_optimizer_step(None, module, None)  # type: ignore[arg-type]
    assert {name: float(value) for name, value in logged.items()} == {"train/grad_norm": 5.0}


def test_a_strategy_without_an_optimizer_has_no_learning_rate(tmp_path: Path) -> None:
    assert main(["run", "ncm", "toy", "--results", str(tmp_path), "--tensorboard"]) == 0


def test_where_a_run_is_logged_does_not_change_its_cell() -> None:
    words = [word for word in OPTIONS if word.startswith("--wandb") or word == "--tensorboard"]
    assert resolve(layers("lora", "toy"), words).hash == resolve(layers("lora", "toy")).hash


def test_tensorboard_that_is_not_installed_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("Neither `tensorboard` nor `tensorboardX` is available.")

    monkeypatch.setattr("cl_bench.run.tracking.TensorBoardLogger", missing)
    assert main(["run", "ncm", "toy", "--results", str(tmp_path), "--tensorboard"]) == 2
    assert "TensorBoard is not installed: run pip install tensorboard." in capsys.readouterr().err


def test_a_tag_that_wandb_refuses_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "ncm", "toy", "--results", str(tmp_path), "--wandb", f"--wandb_tags=[{'x' * 65}]"]
    assert main(words) == 2
    assert "is not a tag of W&B: write 1 to 64 characters" in capsys.readouterr().err
