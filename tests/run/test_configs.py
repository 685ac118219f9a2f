from pathlib import Path

import pytest

from cl_bench.run.configs import CONFIGS, config_file, dumped, load


def test_the_error_of_an_unknown_stem_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no config 'lroa' among strategies. Did you mean lora\?"):
        config_file("strategies", "lroa")
    with pytest.raises(FileNotFoundError, match=r"There is no config file nowhere\.yaml"):
        load(Path("nowhere.yaml"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("just words", "its top level must be a mapping"),
        ("a: [", "is not valid YAML"),
        ("1: 2", r"The key 1 in .*broken.yaml is not text: put it in quotes"),
        ("backbone: {options: {1: 2}}", r"The key 1 in .*broken.yaml is not text: put it in quotes"),
        ("seed: !!binary aGk=", r"The value b'hi' in .*broken.yaml is neither text nor number"),
    ],
)
def test_a_file_that_is_not_a_config_is_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        load(path)


def test_a_dumped_config_loads_with_the_same_values(tmp_path: Path) -> None:
    config = {"a": "1e3", "b": 1e3, "c": "yes", "d": [None, "null", "{"], "e": {"f": "é\n", "g": -1}}
    path = tmp_path / "saved.yaml"
    path.write_text(dumped(config), encoding="utf-8")
    assert load(path) == config


def opening(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith("#")]


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS))
)
def test_every_config_starts_with_its_command(path: Path) -> None:
    assert any("cl-bench " in line for line in opening(path))
