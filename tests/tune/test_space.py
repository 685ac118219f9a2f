from __future__ import annotations

import pytest

from cl_bench.run.configs import stems_of, words
from cl_bench.run.configuration import Configuration, layers, resolve
from cl_bench.tune.space import read_space
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
