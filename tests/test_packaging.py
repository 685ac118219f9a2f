from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGES = ("cl_bench", "strategies", "datamodules")


def printed(code: str, folder: Path) -> list[str]:
    """Return the lines that a new interpreter prints in ``folder``."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def imported(file: Path) -> Iterator[str]:
    """Yield the top-level name of every absolute import in ``file``."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def normalised(requirement: str) -> str:
    """Return the name in ``requirement``, spelt as registries compare names."""
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


@pytest.fixture(scope="module")
def dependencies(checkout: Path) -> list[str]:
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    # Dependencies of a single verb are extras. The extra dev contains tools, which nothing imports.
    extras = {name: needed for name, needed in project["optional-dependencies"].items() if name != "dev"}
    return [requirement for needed in (project["dependencies"], *extras.values()) for requirement in needed]


@pytest.mark.parametrize("package", PACKAGES)
def test_package_resolves_to_this_checkout(package: str, checkout: Path, tmp_path: Path) -> None:
    code = f"from importlib.util import find_spec; spec = find_spec('{package}'); print(spec and spec.origin)"
    (origin,) = printed(code, tmp_path)
    assert origin == str(checkout / package / "__init__.py"), (
        f"`{package}` is found at {origin}, not in this checkout: install the suite, editable, in an "
        "environment without another package of this name."
    )


@pytest.mark.parametrize("pattern", ("__main__", "*/options", "results/*", "report/*", "grid/work"))
def test_commands_cells_and_results_are_read_without_torch_and_lightning(
    pattern: str, checkout: Path, tmp_path: Path
) -> None:
    files = [file.relative_to(checkout).with_suffix("") for file in checkout.glob(f"cl_bench/{pattern}.py")]
    modules = [".".join(file.parts).removesuffix(".__init__") for file in files]
    heavy = {"torch", "torchvision", "lightning", "timm", "torchmetrics", "avalanche"}
    code = f"import sys, {', '.join(modules)}\nfor name in {heavy} & set(sys.modules): print(name)"
    assert printed(code, tmp_path) == []


@pytest.mark.parametrize("verb", ("run", "check"))
def test_the_help_of_a_verb_is_printed_without_torch(verb: str, tmp_path: Path) -> None:
    code = f"from cl_bench.__main__ import main; main(['{verb}', '--help'])\nimport sys; print(*sys.modules)"
    *text, modules = printed(code, tmp_path)
    assert text[0].startswith(f"usage: cl-bench {verb} STRATEGY")
    assert "torch" not in modules.split()


def test_every_import_is_a_declared_dependency(checkout: Path, dependencies: list[str]) -> None:
    declared = {normalised(requirement) for requirement in dependencies}
    owners = packages_distributions()
    files = [file for package in PACKAGES for file in (checkout / package).rglob("*.py")]
    names = {name for file in files for name in imported(file)} - sys.stdlib_module_names - set(PACKAGES)
    undeclared = {name for name in names if declared.isdisjoint(map(normalised, owners.get(name, [name])))}
    assert undeclared == set()


def test_ci_runs_make_test_at_the_root_and_nothing_else(checkout: Path, tmp_path: Path) -> None:
    record = tmp_path / "record"
    recorder = tmp_path / "make"
    recorder.write_text(f'#!/bin/sh\necho "$PWD $*" >> "{record}"\n')
    recorder.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([checkout / ".ci" / "run"], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True)
    assert record.read_text() == f"{checkout} test\n"
