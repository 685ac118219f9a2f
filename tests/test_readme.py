"""What the documents quote must work: links, commands, options, examples."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from cl_bench.__main__ import main
from cl_bench.grid.cells import read_grid
from cl_bench.run.configs import stems_of
from cl_bench.run.configuration import layers, resolve

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("cl_bench", "configs", "datamodules", "notebooks", "strategies", "tests")
README = ROOT / "README.md"
CONTRIBUTING = ROOT / ".github" / "CONTRIBUTING.md"
LOOP, CONFIGS, GRID = (ROOT / room / "README.md" for room in ("cl_bench/loop", "configs", "cl_bench/grid"))
IN_ROOMS = (path for room in ROOMS for path in sorted((ROOT / room).rglob("README.md")))
DOCUMENTS = [README, CONTRIBUTING, *IN_ROOMS]
OF_THE_READER = {"saved.yaml", "compact_lora.yaml", "bounded_lora"}

every_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT).parent)
)


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(document: Path, verb: str) -> Iterator[list[str]]:
    """Yield the words after ``cl-bench VERB`` of every such command, placeholders included."""
    for words in re.findall(rf"cl-bench {verb} ([^`#\n]+)", document.read_text(encoding="utf-8")):
        yield shlex.split(words)


def table_options(document: Path) -> Iterator[list[str]]:
    """Yield the words of every option that a table quotes in backticks."""
    for line in document.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            yield from (option.split() for option in re.findall(r"`(--[^`]+)`", line))


def test_the_readme_has_at_most_200_lines() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("kind", ("strategies", "datamodules"))
def test_every_method_and_dataset_is_in_its_table(kind: str) -> None:
    text = README.read_text(encoding="utf-8")
    for stem in stems_of(kind):
        assert f"`{stem}`" in text, stem


@every_document
def test_links_lead_to_files(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (document.parent / link).exists()]


@every_document
def test_python_examples_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for example in blocks(document, "python"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(example, {"__name__": "example"})
        assert all(0 <= float(number) <= 100 for number in re.findall(r"^[\d.]+$", printed.getvalue(), re.M))


@every_document
def test_quoted_runs_are_valid(document: Path) -> None:
    flags = {"-v", "--help", "--print_config", "--print_protocol"}
    for strategy, *words in commands(document, "run"):
        if strategy not in OF_THE_READER:
            resolve(layers(strategy, words[0]), [word for word in words[1:] if word not in flags])


@pytest.mark.parametrize(
    ("document", "dataset"), ((README, "image_folder"), (CONFIGS, "imagenet_r"), (LOOP, "digits"))
)
def test_options_in_tables_are_valid(document: Path, dataset: str) -> None:
    options = list(table_options(document))
    assert options
    for words in options:
        resolve(layers("lora", dataset), words)


def test_the_options_of_the_readme_set_the_optimizer() -> None:
    (words,) = [words for words in table_options(README) if words[0] == "--optimizer"]
    config = resolve(layers("lora", "image_folder"), [*words, "--optimizer.lr", "0.002"]).resolved
    optimizer = config["model"]["init_args"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.AdamW"
    assert optimizer["init_args"]["lr"] == 0.002


def test_held_out_classes_leave_as_many_as_the_table_gives() -> None:
    (words,) = [words for words in table_options(CONFIGS) if "--held_out_classes" in words]
    data = resolve(layers("lora", "digits"), words).datamodule
    data.setup()
    assert len(data.class_names) == 8


@pytest.mark.parametrize(
    "verb", ("grid", "tune", "report", "predictions", "export", "reproduce", "prepare", "bench")
)
def test_quoted_options_of_other_verbs_exist(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    known = capsys.readouterr().out
    quoted = {
        word
        for document in DOCUMENTS
        for words in commands(document, verb)
        for word in words
        if word.startswith("--") and "=" not in word  # KEY=VALUE goes to cells
    }
    assert not [option for option in quoted if option not in known]


@pytest.mark.parametrize("document", (README, GRID))
def test_quoted_grids_are_valid(document: Path, tmp_path: Path) -> None:
    (grid,) = [block for block in blocks(document, "yaml") if "strategies:" in block]
    path = tmp_path / "my_grid.yaml"
    path.write_text(grid, encoding="utf-8")
    cells = list(read_grid(str(path)).cells())
    assert len({cell.overrides for cell in cells}) > 1
    for cell in cells:
        resolve(layers(cell.strategy, cell.dataset), cell.overrides)


def test_the_method_of_the_readme_keeps_its_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (method,), (config,) = blocks(README, "python"), [b for b in blocks(README, "yaml") if "class_path" in b]
    (tmp_path / "compact_lora.py").write_text(method, encoding="utf-8")
    (tmp_path / "compact_lora.yaml").write_text(config, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (words,) = commands(README, "check")
    assert main(["check", *words]) == 0
    (run,) = [words for words in commands(README, "run") if words[0] == "compact_lora.yaml"]
    configuration = resolve(layers(*run[:2]), run[2:])
    assert configuration.build([], [])[0].strength == 1


def test_the_strategy_of_contributing_passes_its_own_test_and_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (diff,) = blocks(CONTRIBUTING, "diff")
    parts = re.split(r"^\+\+\+ b/(.*)\n", diff, flags=re.MULTILINE)[1:]
    added = {
        Path(path).name: "".join(line[1:] for line in part.splitlines(keepends=True) if line[0] == "+")
        for path, part in zip(parts[::2], parts[1::2], strict=True)
    }
    module = ModuleType("strategies.bounded_lora")
    exec(added["bounded_lora.py"], vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    claims: dict[str, object] = {}
    exec(added["test_bounded_lora.py"], claims)
    (claim,) = [value for name, value in claims.items() if name.startswith("test_")]
    assert callable(claim)
    claim()
    config = tmp_path / "bounded_lora.yaml"
    config.write_text(added[config.name], encoding="utf-8")
    assert main(["check", str(config), "--radius", "0.1"]) == 0
