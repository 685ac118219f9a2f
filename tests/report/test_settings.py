from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from cl_bench.report.settings import differences, distinguishing, short_names, shortened


def test_settings_that_agree_are_no_difference() -> None:
    one = {"model": {"rank": 4, "targets": ["k", "v"]}, "trainer": {"max_epochs": 5}}
    other = {"model": {"rank": 4, "targets": ["q", "v"]}, "trainer": {"max_epochs": 5}}
    assert differences([one, other]) == {"model.targets": ['["k", "v"]', '["q", "v"]']}


def test_a_setting_that_only_one_has_is_a_difference() -> None:
    assert differences([{"rank": 4}, {}]) == {"rank": ["4", None]}


def test_one_key_is_enough_where_two_move_together() -> None:
    moving_together = {"model.rank": ["4", "8"], "model.alpha_of_adapter": ["4", "8"]}
    assert distinguishing(moving_together) == ["model.rank"]


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 4), min_size=2, max_size=12, unique=True))
def test_few_keys_tell_apart_all_that_all_keys_tell_apart(settings: list[tuple[int, ...]]) -> None:
    table = differences([dict(zip("abcd", values, strict=True)) for values in settings])
    chosen = distinguishing(table)
    assert len(set(zip(*(table[key] for key in chosen), strict=True))) == len(settings)


def test_a_short_name_grows_until_it_is_unambiguous() -> None:
    assert short_names(["model.init_args.rank", "head.optimizer.lr", "adapter.optimizer.lr"]) == [
        "rank",
        "head.optimizer.lr",
        "adapter.optimizer.lr",
    ]


def test_shortening_keeps_what_differs_late_in_a_long_value() -> None:
    images = [f"{i:04}.png" for i in range(100)]
    short = shortened([json.dumps(images), json.dumps([*images[:-1], "other.png"])])
    assert "0099" in short[0]
    assert "other" in short[1]
    assert all(len(text) <= 41 for text in short)


def test_a_short_value_is_left_alone() -> None:
    assert shortened(["unit", "half"]) == ["unit", "half"]
