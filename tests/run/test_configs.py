from itertools import pairwise
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
        (
            "model:\n  init_args:\n    rank: 4\n    'rank': 8",
            "The key rank is in .*broken.yaml twice, in lines 3 and 4: remove one of them.",
        ),
        ("seeds: [1, 2]\nseeds: [3]", "The key seeds is in .*broken.yaml twice, in lines 1 and 2"),
        ("model: &a\n  x: *a", "An alias in .*broken.yaml, line 1, contains itself"),
        ("a: &a\n- *a", "An alias in .*broken.yaml, line 1, contains itself"),
        ("[" * 5000, "broken.yaml is nested too deeply"),
    ],
)
def test_a_file_that_is_not_a_config_is_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        load(path)


def test_aliases_that_multiply_are_refused_before_they_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    levels = (f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in pairwise("abcdefghij"))
    path.write_text("\n".join(("a: &a [x, x, x]", *levels)))
    with pytest.raises(ValueError, match=r"The aliases in .*bomb.yaml stand for [0-9,]{9,} values"):
        load(path)


def test_an_alias_stands_for_its_value(tmp_path: Path) -> None:
    path = tmp_path / "aliases.yaml"
    path.write_text("one: &one {a: 1, b: [2]}\ntwo: *one\nthree: {<<: *one, a: 3}")
    assert load(path) == {"one": {"a": 1, "b": [2]}, "two": {"a": 1, "b": [2]}, "three": {"a": 3, "b": [2]}}


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin1.yaml"
    path.write_bytes("# Straße\nseed: 1".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin1.yaml is not UTF-8 text \(byte 0xdf at position 6\)"):
        load(path)


def test_a_tilde_in_a_config_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    path = tmp_path / "paths.yaml"
    path.write_text("{results: ~/a, data: {init_args: {root: '~', name: a~b}}, strategies: [~/c.yaml]}")
    assert load(path) == {
        "results": "/home/x/a",
        "data": {"init_args": {"root": "/home/x", "name": "a~b"}},
        "strategies": ["/home/x/c.yaml"],
    }


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
