"""Results that an earlier version wrote are read, count as done and report the same numbers.

``before.json`` holds results of commit 927737c with the commands that made them, and ``before.csv`` the table
that its own report printed of them. Those of JANUS-LoRA and LoRA-GPM are of commit b21ea44, whose damping is
relative; their counts are the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cl_bench.report.command import report
from cl_bench.results.result import FILE_NAME, digest, read
from cl_bench.run.configuration import Configuration, layers, resolve
from cl_bench.run.run import finished, run

HERE = Path(__file__).parent
BEFORE: list[dict[str, Any]] = json.loads((HERE / "before.json").read_text())
EACH = pytest.mark.parametrize("entry", BEFORE, ids=[" ".join(entry["command"][:1]) for entry in BEFORE])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for entry in BEFORE:
        folder = tmp_path / entry["folder"]
        folder.mkdir(parents=True)
        (folder / FILE_NAME).write_text(json.dumps(entry["result"]))
    return tmp_path


def configuration(entry: dict[str, Any], results: Path) -> Configuration:
    strategy, dataset, *options = entry["command"]
    return resolve(layers(strategy, dataset), [*options, "--results", str(results)])


@EACH
def test_an_earlier_result_is_read(entry: dict[str, Any], results: Path) -> None:
    result = read(results / entry["folder"] / FILE_NAME)
    assert [vars(row) for row in result.rows if row] == [row for row in entry["result"]["rows"] if row]
    assert digest(result.config) == entry["result"]["cell"]


@EACH
def test_the_same_command_finds_the_earlier_result_and_runs_nothing(
    entry: dict[str, Any], results: Path
) -> None:
    cell = configuration(entry, results)
    assert cell.hash == entry["result"]["cell"]
    assert finished(cell) == results / entry["folder"] / FILE_NAME
    before = (results / entry["folder"] / FILE_NAME).stat().st_mtime_ns
    assert run(cell).provenance["commit"] == entry["result"]["provenance"]["commit"]
    assert (results / entry["folder"] / FILE_NAME).stat().st_mtime_ns == before


@pytest.mark.parametrize("entry", BEFORE[::4], ids=[" ".join(entry["command"][:1]) for entry in BEFORE[::4]])
def test_the_earlier_config_still_is_the_same_cell(entry: dict[str, Any], results: Path) -> None:
    own = configuration(entry, results)
    config = {key: value for key, value in entry["result"]["config"].items() if key != "dataset"}
    config["backbone"] = config["backbone"] | {"weights": own.namespace.backbone.weights}
    assert resolve([config], ["--results", str(results)]).hash == entry["result"]["cell"]


def test_the_report_of_earlier_results_has_the_same_numbers(results: Path) -> None:
    assert report(results, "csv").text.strip() == (HERE / "before.csv").read_text().strip()


@pytest.mark.parametrize(
    ("strategy", "dataset"),
    (("lora", "digits"), ("keeplora", "imagenet_r"), ("inflora", "toy"), ("joint", "toy")),
)
def test_a_saved_config_is_the_same_cell(strategy: str, dataset: str, tmp_path: Path) -> None:
    cell = resolve(layers(strategy, dataset), ["--root=/data"] if dataset == "imagenet_r" else [])
    saved = tmp_path / "config.yaml"
    saved.write_text(cell.yaml)
    assert resolve([saved]).hash == cell.hash
