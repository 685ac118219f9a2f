import logging
import warnings
from collections import Counter
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from cl_bench.network.backbones import Backbone
from cl_bench.results.result import FILE_NAME, read
from cl_bench.run.configuration import Configuration, layers, resolve
from cl_bench.run.run import finished, quiet, run
from datamodules.toy import Toy


def toy(folder: Path, *overrides: str) -> Configuration:
    words = [f"--results={folder}", "--trainer.accelerator=cpu", *overrides]
    return resolve(layers("linear_probe", "toy"), words)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Configuration:
    configuration = toy(tmp_path_factory.mktemp("done"))
    run(configuration)
    return configuration


def test_only_a_finished_cell_is_done_under_any_name_of_its_setting(tmp_path: Path) -> None:
    configuration = toy(tmp_path)
    assert finished(configuration) is None
    run(configuration)
    path = configuration.folder / FILE_NAME
    assert finished(configuration) == path
    assert finished(toy(tmp_path, "--setting=named")) == path
    assert finished(toy(tmp_path, "--seed=2")) is None
    result = read(path)
    result.status = "failed"
    result.write(configuration.folder)
    assert finished(configuration) is None
    path.write_text("broken")
    assert finished(configuration) is None


@pytest.mark.parametrize("words", (["simplecil"], ["ncm", "--similarity=cosine"]))
def test_a_cell_is_done_whatever_its_settings_are_called(tmp_path: Path, words: list[str]) -> None:
    stem, *overrides = words
    given = [f"--results={tmp_path}", "--trainer.accelerator=cpu", *overrides]
    configuration = resolve(layers(stem, "toy"), given)
    run(configuration)
    assert finished(configuration) == configuration.folder / FILE_NAME


@pytest.mark.parametrize(
    "forged",
    [
        {"strategy": "InfLoRA"},
        {"dataset": "digits"},
        {"seed": 2},
        {"order": "numpy-1993"},
        {"config": {"rank": 4}},
        {"regime": "joint", "rows": [None, None]},
    ],
    ids=lambda forged: next(iter(forged)),
)
def test_a_result_of_another_cell_under_the_right_name_is_not_done(
    done: Configuration, tmp_path: Path, forged: dict[str, Any]
) -> None:
    result = read(done.folder / FILE_NAME)
    if "rows" in forged:
        forged = forged | {"rows": [*forged["rows"], result.rows[-1]]}
    again = toy(tmp_path)
    replace(result).write(again.folder)
    assert finished(again) == again.folder / FILE_NAME
    replace(result, **forged).write(again.folder)
    assert finished(again) is None


def test_a_second_attempt_replaces_the_files_of_the_first(tmp_path: Path) -> None:
    configuration = toy(tmp_path)
    first = run(configuration)
    first.status = "failed"
    first.write(configuration.folder)
    (configuration.folder / "error.txt").write_text("of an earlier attempt")
    second = run(toy(tmp_path))
    assert first.rows == second.rows
    assert not (configuration.folder / "error.txt").exists()
    curves = (configuration.folder / "curves" / "metrics.csv").read_text().splitlines()
    assert len([line for line in curves[1:] if line]) < 20


def test_a_run_builds_its_datamodule_once_and_a_done_cell_no_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: Counter[str] = Counter()

    def counted(class_: type[Any]) -> None:
        original = class_.__init__

        @wraps(original)  # the schema reads its signature
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            built[class_.__name__] += 1
            original(self, *args, **kwargs)

        monkeypatch.setattr(class_, "__init__", init)

    counted(Toy)
    counted(Backbone)
    configuration = toy(tmp_path)
    assert finished(configuration) is None
    run(configuration)
    assert built == {"Toy": 1, "Backbone": 1}
    assert finished(toy(tmp_path)) is not None
    assert built == {"Toy": 2, "Backbone": 1}


def test_quiet_hides_warnings_and_restores_the_log_levels() -> None:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    with pytest.raises(ArithmeticError), quiet():
        warnings.warn("a notice", UserWarning, stacklevel=1)
        assert not logger.isEnabledFor(logging.WARNING)
        raise ArithmeticError
    assert logger.level == level
    with pytest.warns(UserWarning, match="shown again"):
        warnings.warn("shown again", UserWarning, stacklevel=1)
