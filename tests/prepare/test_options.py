from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from cl_bench.prepare.imagenet import Missing
from cl_bench.prepare.options import add_arguments, run


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser


def test_the_options_reach_the_preparation(
    tmp_path: Path, parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["imagenet100", "--root", str(tmp_path), "--source", str(tmp_path / "here"), "--classes", "cmc"]
    with pytest.raises(Missing, match=r"here holds neither .*, and 100 classes are missing"):
        run(parser.parse_args(words))
    assert "Register at https://image-net.org" in capsys.readouterr().out


def test_an_unknown_class_list_is_refused(tmp_path: Path, parser: argparse.ArgumentParser) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["imagenet100", "--root", str(tmp_path), "--classes", "mine"])


@pytest.mark.parametrize(
    ("module", "heavy"),
    [("options", {"numpy", "rich", "httpx", "torch"}), ("command", {"torch", "lightning", "avalanche"})],
)
def test_nothing_heavy_is_imported(module: str, heavy: set[str]) -> None:
    code = f"import sys, cl_bench.prepare.{module}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
