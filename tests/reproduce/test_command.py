"""The verb on the toy stream under a published name: the path is real, the numbers mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cl_bench.__main__ import main
from cl_bench.data.published import domainnet
from cl_bench.data.published.imagenet_r import SHA256, Split
from cl_bench.grid.cells import Cell
from cl_bench.loop.provenance import data_hashes
from cl_bench.reproduce.command import Wanted
from cl_bench.results.result import Cost, Protocol, Result, Row
from datamodules.toy import Toy

TOY = """
data: {class_path: datamodules.toy.Toy, init_args: {image_size: 16, num_classes: 10}}
backbone:
  model: vision_transformer
  weights: random
  options: {img_size: 16, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}
  normalisation: half
trainer: {max_epochs: 1}
"""


@pytest.fixture
def wanted(tmp_path: Path) -> Wanted:
    """Plain LoRA against InfLoRA on the toy stream under the name of ImageNet-R, with five experiences."""
    dataset = tmp_path / "imagenet_r.yaml"
    dataset.write_text(TOY)
    return Wanted("lora", str(dataset), 5, "inflora", (1, 2, 3), ("identity",), tmp_path / "results", ())


def _command(wanted: Wanted, *more: str) -> list[str]:
    seeds = [str(seed) for seed in wanted.seeds]
    words = ["reproduce", wanted.strategy, wanted.dataset, "--num_experiences", "5", "--seeds", *seeds]
    return [*words, "--results", str(wanted.results), *more]


def _leave(
    cell: Cell,
    final: float,
    protocol: str = "one",
    identity: dict[str, Any] | None = None,
) -> None:
    """Leave a finished result of ``cell`` whose final accuracy is ``final`` percent, of 1,000 images."""
    configuration = cell.configuration()
    correct = [int(10 * final)] * 5
    Result(
        strategy=configuration.strategy_class.name,
        dataset=configuration.datamodule.name,
        experiences=[(i, i + 1) for i in range(5)],
        class_names=list("abcde"),
        test_images=[1_000] * 5,
        order="identity",
        seed=configuration.namespace.seed,
        regime="sequential",
        protocol=Protocol({"data": protocol} | (identity or {}), {}, {}),
        config=configuration.cell,
        status="done",
        rows=[Row(correct[: i + 1], correct[: i + 1], correct[: i + 1]) for i in range(5)],
        costs=[Cost({"training": 1.0}, 1, 1, 1)],
    ).write(configuration.folder)


def _leave_all(wanted: Wanted, lora: Callable[[int], float], inflora: Callable[[int], float]) -> None:
    for name, final in (("lora", lora), ("inflora", inflora)):
        for seed, cell in zip(wanted.seeds, wanted.cells(name), strict=True):
            _leave(cell, final(seed))


def _row(text: str, *words: str) -> list[str]:
    (line,) = (
        line
        for line in text.splitlines()
        if all(f"| {word} " in f" {line}" or word in line for word in words)
    )
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_ours_stands_beside_the_published_number(wanted: Wanted, capsys: pytest.CaptureFixture[str]) -> None:
    # Published: 69.75 and 76.31, a difference of -6.56.
    _leave_all(wanted, lambda seed: 69 + 0.5 * seed, lambda seed: 75.5 + 0.5 * seed + 0.1 * (seed == 2))
    assert main(_command(wanted)) == 0
    text = capsys.readouterr().out
    assert "lora: 3 of 3 cells done; inflora: 3 of 3 cells done" in text
    level = _row(text, "JANUS-LoRA, ICML 2026", "acc/sample", "69.75")
    assert level[2:4] == ["69.75 ± 0.87", "70.00 ± 0.50 (3)"]
    assert level[5:] == ["+0.25", "met"]
    contrast = _row(text, "JANUS-LoRA, ICML 2026", "acc/sample", "-6.56")
    assert contrast[3] == "-6.53 (3)"
    assert contrast[5] == "met"
    assert "lora is partly a reconstruction: the training settings of the baseline" in text
    assert "Levels are compared under another protocol" in text
    assert ": reproduced" not in text
    assert "ours have 5,000 test images" not in text  # the toy has no published size
    assert "JANUS-LoRA, ICML 2026, tables of its project page used vit_base_patch16_224.augreg_in21k" in text
    assert "reproduced" not in text.partition("inflora on imagenet_r")[0]


def test_a_number_that_only_others_print_is_not_the_strategys_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only JANUS-LoRA prints a number of InfLoRA on ImageNet-100."""
    dataset = tmp_path / "imagenet100.yaml"
    dataset.write_text(TOY.replace("num_classes: 5", "num_classes: 10"))
    wanted = Wanted("inflora", str(dataset), 10, None, (1,), ("identity",), tmp_path / "results", ())
    words = ["reproduce", "inflora", str(dataset), "--seeds", "1", "--results", str(wanted.results)]
    main([*words, "--dry-run"])
    assert "o number of its own paper or code is known here" in capsys.readouterr().out


def test_published_rows_of_domainnet_do_not_state_their_variant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = tmp_path / "domainnet.yaml"
    dataset.write_text(TOY)
    wanted = Wanted("inflora", str(dataset), 5, None, (1,), ("identity",), tmp_path / "results", ())
    (cell,) = wanted.cells("inflora")
    words = ["reproduce", "inflora", str(dataset), "--seeds", "1", "--results", str(wanted.results)]
    main([*words, "--dry-run"])
    assert f"- {domainnet.UNSAID}" in capsys.readouterr().out
    monkeypatch.setattr(Toy, "name", "domainnet")
    _leave(cell, 70.0)
    assert main(words) == 0
    text = capsys.readouterr().out
    assert f"- {domainnet.UNSAID}" in text
    assert "which domains it pools is not stated): not a reproduction" in text
    assert "the usual list" not in text


@pytest.mark.parametrize("split", ["coda", "inflora"])
def test_lists_with_equal_numbers_of_test_images_are_distinguished(
    wanted: Wanted, split: Split, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Toy, "name", "imagenet_r")
    (first, *_) = wanted.cells("lora")
    ours = data_hashes(first.configuration().datamodule)["test_images"]
    monkeypatch.setitem(SHA256, (split, "test"), ours)
    for name in ("lora", "inflora"):
        for cell in wanted.cells(name):
            _leave(cell, 70.0, identity={"test_images": ours})
    assert main(_command(wanted)) == 0
    text = capsys.readouterr().out
    named = {
        other: f"evaluates on the list {other}, ours on another" in text for other in ("coda", "inflora")
    }
    assert named == {"coda": split != "coda", "inflora": split != "inflora"}
    assert "the usual list" not in text


def test_a_dry_run_counts_missing_cells_and_runs_none(
    wanted: Wanted, capsys: pytest.CaptureFixture[str]
) -> None:
    _leave(wanted.cells("lora")[0], 70.0)
    assert main(_command(wanted, "--dry-run")) == 0
    text = capsys.readouterr().out
    assert "lora: 1 of 3 cells done; inflora: 0 of 3 cells done" in text
    assert "5 cells not done: about" in text
    assert _row(text, "acc/sample", "69.75")[4] == "n too small"
    assert _row(text, "acc/sample", "-6.56")[5] == "not run"


def test_a_cell_that_is_not_done_is_run(wanted: Wanted, capsys: pytest.CaptureFixture[str]) -> None:
    one = replace(wanted, seeds=(1,))
    assert main(_command(one, "--against", "lora", "--workers", "1")) == 0
    text = capsys.readouterr().out
    assert "1 of 1 cells done" in text
    assert _row(text, "acc/sample", "69.75")[3].endswith("(1)")


def test_unequal_protocols_are_never_averaged(wanted: Wanted, capsys: pytest.CaptureFixture[str]) -> None:
    cells = wanted.cells("lora")
    _leave(cells[0], 70.0, protocol="one")
    _leave(cells[1], 60.0, protocol="two")
    assert main(_command(wanted, "--dry-run")) == 0
    text = capsys.readouterr().out
    assert text.count("which shares no table with the others") == 2
    assert "70.00 (1)" in text
    assert "60.00 (1)" in text
    assert "65.00" not in text


def test_missing_data_are_named_with_the_time_of_the_cells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = tmp_path / "imagenet_r.yaml"
    dataset.write_text(
        TOY.replace("datamodules.toy.Toy", "datamodules.image_folder.ImageFolder").replace(
            "{image_size: 16, num_classes: 10}", f"{{image_size: 16, root: {tmp_path}/absent}}"
        )
    )
    words = ["reproduce", "janus_lora", str(dataset), "--num_experiences", "20", "--results", str(tmp_path)]
    assert main([*words, "--seeds", "1"]) == 1
    text = capsys.readouterr().out
    assert text.startswith("Nothing can run: ")
    assert str(tmp_path / "absent") in text.splitlines()[0]
    assert "2 cells not done: about" in text
    assert "ms an image in training" in text
    assert "reproduced" not in text.partition("inflora on imagenet_r")[0]


def test_a_choice_of_published_lengths_needs_num_experiences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "janus_lora", "imagenet_r"]) == 2
    assert "published with 5 or 10 or 20 experiences: give --num_experiences." in capsys.readouterr().err


def test_a_word_that_is_not_a_setting_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "janus_lora", "imagenet_r", "--rank", "4"]) == 2
    assert "is not a setting: write --KEY=VALUE" in capsys.readouterr().err


def test_cells_differ_in_seed_and_order_only(wanted: Wanted) -> None:
    cells = replace(wanted, orders=("identity", "numpy:1993")).cells("lora")
    assert len({cell.overrides for cell in cells}) == 6
    assert len(np.unique([len(cell.overrides) for cell in cells])) == 1


@pytest.mark.parametrize("length", [[], ["--num_experiences", "10"]])
@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["inflora", "imagenet_t"], "of inflora on 'imagenet_t' is known here. Did you mean imagenet_r?"),
        (["inflroa", "imagenet_r"], "of 'inflroa' is known here. Did you mean inflora?"),
        (["inflora", "digits"], "of inflora on 'digits' is known here. Choose among cifar100, domainnet, "),
    ],
)
def test_a_misspelt_name_suggests_the_nearest(
    names: list[str], length: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", *names, *length]) == 2
    assert f"error: No published number {sentence}" in capsys.readouterr().err
