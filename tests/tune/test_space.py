from __future__ import annotations

from typing import Any

import pytest

from cl_bench.data.experience import Experience
from cl_bench.run.configs import CONFIGS, load, stems_of, words
from cl_bench.run.configuration import Configuration, layers, resolve
from cl_bench.tune.space import read_space, space_of
from cl_bench.tune.study import configured

METHODS = stems_of("strategies")


@pytest.fixture(scope="module")
def bases() -> dict[str, Configuration]:
    return {name: resolve(layers(name, "imagenet_r"), ["--root=/data"]) for name in METHODS}


def test_every_strategy_has_a_space_of_at_most_four_settings() -> None:
    assert stems_of("spaces") == METHODS
    sizes = {name: len(read_space(name).settings) for name in METHODS}
    assert max(sizes.values()) <= 4
    assert {name for name, size in sizes.items() if size == 0} == {"ncm", "simplecil"}


def test_every_space_resolves_at_its_corners(bases: dict[str, Configuration]) -> None:
    for name, base in bases.items():
        hashes = {base.overridden(words(corner)).hash for corner in read_space(name).corners()}
        assert len(hashes) == (2 if read_space(name).settings else 0), name


def test_every_space_contains_the_published_value(bases: dict[str, Configuration]) -> None:
    for name, base in bases.items():
        for setting in read_space(name).settings:
            value = configured(base, setting.key)
            value = (
                configured(base, "optimizer.lr") if value is None else value
            )  # a head without its own rate
            assert setting.holds(value), (name, setting.key, value)


def test_the_rates_of_a_space_reach_the_optimizer() -> None:
    """A study would spend trials on a rate that nothing is trained with."""
    for name in METHODS:
        for setting in read_space(name).settings:
            if setting.key in ("optimizer.lr", "head_lr"):
                low, high = (rates(name, f"--{setting.key}={rate}") for rate in (0.25, 0.5))
                assert low != high, (name, setting.key)


def rates(name: str, word: str) -> list[float]:
    """The learning rates of the parameter groups in the first experience of toy, with five blocks."""
    base = resolve(layers(name, "toy"), ["--backbone.options.depth=5", "--optimizer=SGD", word])
    strategy, _ = base.overridden(words(base.strategy_class.small)).build([], [])
    strategy.expand(Experience(0, 3, range(2)))
    optimizer: Any = strategy.configure_optimizers()
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize(
    ("content", "sentence"),
    (
        ({"rank": 4}, r"rank cannot be 4: write \{low: 1e-4, high: 1e-2, log: true\}"),
        ({"rank": {"low": 1, "hihg": 4}}, r"rank cannot contain 'hihg'. Did you mean high\?"),
        ({"rank": {"low": 4, "high": 1}}, "rank cannot be"),
        ({"rank": {"low": 4}}, "rank cannot be"),
        ({"rank": {"choices": [[1, 2]]}}, "choices are a list of words, numbers, true or false"),
        ({"rank": {"low": 1, "high": 4, "when": {"scale": 1}}}, "write scale above it"),
        (
            {"a": {"choices": [1, 2]}, "b": {"low": 1, "high": 4, "when": {"a": 3}}},
            "b depends on a = 3, which a cannot be",
        ),
    ),
)
def test_a_wrong_space_is_refused_with_its_remedy(content: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        space_of(content)


def test_the_sweep_varies_what_the_space_varies() -> None:
    sweep = load(CONFIGS / "sweeps" / "lora.yaml")
    ranges = {key: (one["min"], one["max"]) for key, one in sweep["parameters"].items()}
    assert ranges == {one.key: tuple(one.ends) for one in read_space("lora").settings}
    words_of_a_run = [word for word in sweep["command"] if word.startswith("--")]
    assert resolve(layers("lora", "characters"), words_of_a_run).datamodule.first_experiences == 3
