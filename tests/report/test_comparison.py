from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from cl_bench.report.comparison import (
    Comparison,
    comparisons,
    contrasts,
    differences,
    distinguishing,
    short_names,
    shortened,
)
from cl_bench.report.statistics import Contrast, against, corrected
from cl_bench.report.tables import tables
from cl_bench.results.result import Result

Made = Callable[..., Result]


def test_runs_that_differ_in_seed_and_order_are_one_entry(made: Made) -> None:
    (comparison,) = comparisons([made(seed=1), made(seed=2), made(seed=1, order="numpy:1993")])
    (entry,) = comparison.entries
    assert entry.statistic("acc/sample").n == 3


def test_only_finished_runs_enter_a_mean(made: Made) -> None:
    results = [made(seed=1)]
    for seed, status in enumerate(("failed", "diverged", "running"), start=2):
        results.append(made(counts=((0,), (0, 0)), seed=seed, status=status))
    (entry,) = comparisons(results)[0].entries
    assert entry.statistic("acc/sample").mean == 65.0
    assert [run.seed for run in entry.unfinished] == [2, 3, 4]


def test_unequal_identities_are_never_compared(made: Made) -> None:
    compared = comparisons([made(seed=1), made(seed=2, identity={"image_size": 64})])
    assert [len(comparison.results) for comparison in compared] == [1, 1]
    assert not any(comparison.only_protocol for comparison in compared)


def test_lengths_of_a_stream_are_benchmarks_of_their_own(made: Made) -> None:
    long = made(counts=[(9,) * i for i in range(1, 11)])
    assert [comparison.title for comparison in comparisons([long, made()])] == ["digits-T2", "digits-T10"]


def test_a_copied_result_counts_once(made: Made) -> None:
    (comparison,) = comparisons([made(seed=1), made(seed=1), made(seed=2)])
    assert comparison.entries[0].statistic("acc/sample").n == 2
    assert comparison.copies == 1


def test_the_finished_copy_of_a_result_counts(made: Made) -> None:
    (entry,) = comparisons([made(status="running"), made(), made(status="failed")])[0].entries
    assert len(entry.runs) == 1
    assert not entry.unfinished


def test_a_cell_whose_finished_files_disagree_enters_no_mean(made: Made) -> None:
    results = [
        made(seed=1),
        made(seed=1, counts=((9,), (9, 9))),
        made(seed=2),
        made(seed=2),
        made("NCM", seed=1),
    ]
    (comparison,) = comparisons(results)
    lora, _ = sorted(comparison.entries, key=lambda entry: entry.label)
    assert [run.seed for run in lora.runs] == [2]
    assert lora.statistic("acc/sample").mean == 65.0
    assert (lora.disagreeing, lora.statuses, lora.unfinished) == ([(1, "identity")], ["disagreeing"], [])
    assert comparison.copies == 1


def test_files_that_all_disagree_leave_an_entry_without_a_mean(made: Made) -> None:
    (comparison,) = comparisons([made(), made(counts=((9,), (9, 9)))])
    (entry,) = comparison.entries
    assert entry.statistic("acc/sample").n == 0
    assert comparison.finished == []
    assert comparison.blocks == entry.blocks


def test_seconds_and_memory_are_averaged_on_one_device_only(made: Made) -> None:
    results = [made(seed=1), made(seed=2), made(seed=3, provenance={"device": "NVIDIA H200"})]
    for cost in results[2].costs:
        cost.seconds["training"], cost.peak_memory_bytes = 0.1, 9 * 10**9
    (entry,) = comparisons(results)[0].entries
    assert entry.devices == ["cpu (x86_64)", "NVIDIA H200"]
    found = {
        name: entry.statistic(name)
        for name in ("seconds", "peak_megabytes", "stored_megabytes", "acc/sample")
    }
    assert {name: value.n for name, value in found.items()} == {
        "seconds": 2,
        "peak_megabytes": 2,
        "stored_megabytes": 3,
        "acc/sample": 3,
    }
    assert (found["seconds"].mean, found["peak_megabytes"].mean) == (5.0, 1000.0)


def test_joint_comes_first_and_the_rest_by_falling_accuracy(made: Made) -> None:
    results = [
        made("weak", ((9,), (1, 8))),
        made("failed", status="failed"),
        made("strong", ((9,), (8, 8))),
        made("strong (joint)", (None, (2, 2)), regime="joint"),
    ]
    labels = [entry.label for entry in comparisons(results)[0].entries]
    assert labels == ["strong (joint)", "strong", "weak", "failed"]


def test_entries_of_one_name_are_labelled_by_the_setting_that_differs(made: Made) -> None:
    results = [
        made(config={"model": {"rank": rank, "alpha": 2 * rank, "epochs": 5}}, seed=seed)
        for rank in (4, 8)
        for seed in (1, 2)
    ]
    (comparison,) = comparisons(results)
    assert {entry.label for entry in comparison.entries} == {"LoRA (merge), rank=4", "LoRA (merge), rank=8"}
    assert comparison.unnamed_settings == {"LoRA (merge)": ["alpha"]}


def test_the_name_of_a_setting_is_in_the_label(made: Made) -> None:
    results = [made(), made(setting="paper", config={"model": {"rank": 8}})]
    (comparison,) = comparisons(results)
    assert {entry.label for entry in comparison.entries} == {"LoRA (merge)", "LoRA (merge), paper"}
    assert comparison.unnamed_settings == {"LoRA (merge)": ["rank"]}


def test_labels_are_unique_even_where_long_values_are_cut_alike(made: Made) -> None:
    values = ["a" * 60 + "b" * 60, "a" * 60 + "b" * 60 + "c", "z"]
    (comparison,) = comparisons([made(config={"text": value}) for value in values])
    assert len({entry.label for entry in comparison.entries}) == 3


def test_no_name_of_a_strategy_can_take_the_label_of_another(made: Made) -> None:
    same = [made(config={"text": "a" * 60 + "b" * 60 + end}) for end in ("", "c")]
    forged = made(f"LoRA (merge), text=…{'b' * 39}, group={same[0].group}")
    (comparison,) = comparisons([*same, forged, made(f"{same[0].strategy}\x1b[2J")])
    labels = [entry.label for entry in comparison.entries]
    assert len(set(labels)) == 4
    assert all(label.isprintable() for label in labels)


def test_joint_and_sequential_runs_of_a_strategy_are_two_entries(made: Made) -> None:
    (comparison,) = comparisons([made(), made("LoRA (joint)", (None, (9, 9)), regime="joint")])
    assert [entry.label for entry in comparison.entries] == ["LoRA (joint)", "LoRA (merge)"]


def test_costs_are_the_sum_of_seconds_the_most_parameters_and_the_last_storage(made: Made) -> None:
    (entry,) = comparisons([made()])[0].entries
    means = [entry.statistic(name).mean for name in ("seconds", "trainable_parameters", "stored_megabytes")]
    assert means == [5.0, 101.0, 1.5]


def test_equal_settings_are_not_a_difference() -> None:
    one = {"model": {"rank": 4, "targets": ["k", "v"]}, "trainer": {"max_epochs": 5}}
    other = {"model": {"rank": 4, "targets": ["q", "v"]}, "trainer": {"max_epochs": 5}}
    assert differences([one, other]) == {"model.targets": ['["k", "v"]', '["q", "v"]']}


def test_a_setting_that_only_one_has_is_a_difference() -> None:
    assert differences([{"rank": 4}, {}]) == {"rank": ["4", None]}


def test_one_key_is_enough_if_two_change_together() -> None:
    moving_together = {"model.rank": ["4", "8"], "model.alpha_of_adapter": ["4", "8"]}
    assert distinguishing(moving_together) == ["model.rank"]


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 4), min_size=2, max_size=12, unique=True))
def test_few_keys_distinguish_everything_that_all_keys_distinguish(settings: list[tuple[int, ...]]) -> None:
    table = differences([dict(zip("abcd", values, strict=True)) for values in settings])
    chosen = distinguishing(table)
    assert len(set(zip(*(table[key] for key in chosen), strict=True))) == len(settings)


def test_many_keys_are_shortened_in_time_that_grows_with_their_number() -> None:
    keys = [f"part{number % 7}.key{number}" for number in range(20_000)]
    began = time.process_time()
    assert len(set(short_names(keys))) == len(keys)
    assert time.process_time() - began < 2


def test_a_short_name_grows_until_it_is_unique() -> None:
    assert short_names(["model.init_args.rank", "head.optimizer.lr", "adapter.optimizer.lr"]) == [
        "rank",
        "head.optimizer.lr",
        "adapter.optimizer.lr",
    ]


def test_shortening_keeps_a_difference_at_the_end_of_long_values() -> None:
    images = [f"{i:04}.png" for i in range(100)]
    short = shortened([json.dumps(images), json.dumps([*images[:-1], "other.png"])])
    assert "0099" in short[0]
    assert "other" in short[1]
    assert all(len(text) <= 41 for text in short)


def test_a_short_value_stays_whole() -> None:
    assert shortened(["unit", "half"]) == ["unit", "half"]


def _compared(made: Made, finals: dict[str, Sequence[int]]) -> Comparison:
    """Return a comparison from the final number of right images of twenty, by strategy and block."""
    results = [
        made(name, ((10,), (right // 2, right - right // 2)), seed=block % 5, order=f"numpy:{block // 5}")
        for name, counts in finals.items()
        for block, right in enumerate(counts)
    ]
    (comparison,) = comparisons(results)
    return comparison


def _corrected(comparison: Comparison, metric: str = "acc/sample") -> list[Contrast]:
    """Return the contrasts of a table with only this benchmark and metric."""
    return corrected([{metric: contrasts(comparison, metric)}])[0][metric]


def test_the_difference_is_paired_by_seed_and_order(made: Made) -> None:
    first, second = [14, 10, 18, 12, 16], [13, 9, 16, 11, 14]
    (pair,) = contrasts(_compared(made, {"a": first, "b": second}), "acc/sample")
    assert pair.difference.values == (5.0, 5.0, 10.0, 5.0, 10.0)
    assert (pair.wins, pair.ties, pair.losses) == (5, 0, 0)


def test_a_difference_is_no_sharper_than_one_image_of_either_entry(made: Made) -> None:
    first, second = [14, 10, 18, 12, 16], [13, 9, 16, 11, 14]
    (pair,) = contrasts(_compared(made, {"a": first, "b": second}), "acc/sample")
    theirs = scipy.stats.ttest_rel(np.multiply(first, 5.0), np.multiply(second, 5.0)).confidence_interval()
    # One of twenty images is five points: the mean, 7, more or less half of it for each entry.
    assert 2.0 < theirs.low < theirs.high < 12.0
    assert (pair.difference.interval.low, pair.difference.interval.high) == (2.0, 12.0)


def test_two_seeds_give_neither_interval_nor_verdict(made: Made) -> None:
    equal = contrasts(_compared(made, {"a": [14, 14], "b": [10, 10]}), "acc/sample")
    unequal = contrasts(_compared(made, {"a": [14, 20], "b": [10, 5]}), "acc/sample")
    assert [pair.verdict for pair in (*equal, *unequal)] == ["n too small"] * 2
    assert not any(pair.difference.interval.exists for pair in (*equal, *unequal))


def test_seconds_have_no_interval_below_zero(made: Made) -> None:
    results = [made(seed=seed) for seed in range(3)]
    for result, seconds in zip(results, (1.0, 2.0, 60.0), strict=True):
        result.costs[0].seconds["training"] = seconds
    (comparison,) = comparisons(results)
    interval = comparison.entries[0].statistic("seconds").interval
    assert 0 < interval.low < interval.high


def test_a_planted_difference_is_found_where_unpaired_spread_would_hide_it(made: Made) -> None:
    easy_and_hard = [2, 18, 6, 14, 10, 8, 16, 4]
    comparison = _compared(made, {"ahead": [right + 2 for right in easy_and_hard], "behind": easy_and_hard})
    (pair,) = _corrected(comparison)
    assert pair.difference.mean == 10.0
    assert pair.p == pair.p_holm == 2 / 2**8
    assert pair.verdict == "significant after Holm"


def test_a_planted_tie_is_possibly_noise(made: Made) -> None:
    (pair,) = contrasts(
        _compared(made, {"a": [10, 12, 14, 12, 11, 13], "b": [11, 11, 15, 11, 12, 12]}), "acc/sample"
    )
    assert pair.verdict == "possibly noise"
    assert pair.p == 1.0


def test_only_shared_blocks_enter_a_difference(made: Made) -> None:
    (pair,) = contrasts(_compared(made, {"a": [20, 10, 10], "b": [8, 8]}), "acc/sample")
    assert pair.difference.values == (60.0, 10.0)


def test_the_verdict_names_too_few_blocks(made: Made) -> None:
    def verdict(blocks: int) -> str:
        counts = [10, 11, 12, 13, 14, 15][:blocks]
        comparison = _compared(made, {"a": [right + 2 for right in counts], "b": counts})
        return _corrected(comparison)[0].verdict

    assert verdict(2) == "n too small"
    assert verdict(3) == "interval clear of zero; too few blocks to test"
    assert verdict(5) == "interval clear of zero; too few blocks to test"
    assert verdict(6) == "significant after Holm"


def test_strategies_without_a_shared_block_are_not_compared(made: Made) -> None:
    (comparison,) = comparisons([made("a", seed=1), made("b", seed=2)])
    (pair,) = contrasts(comparison, "acc/sample")
    assert pair.verdict == "no shared block"
    assert math.isnan(pair.difference.mean)


def test_holm_covers_all_pairs(made: Made) -> None:
    counts = [10, 11, 12, 13, 14, 15]
    comparison = _compared(
        made, {name: [right + shift for right in counts] for name, shift in (("a", 4), ("b", 2), ("c", 0))}
    )
    # Every pair reaches the smallest p of six blocks, 2 / 64; three of them make it three times that.
    assert [pair.p_holm for pair in _corrected(comparison)] == pytest.approx([6 / 64] * 3)
    assert {pair.verdict for pair in _corrected(comparison)} == {
        "interval clear of zero; too few blocks for 3 tests"
    }


def test_holm_covers_every_metric_and_benchmark_of_a_table(made: Made) -> None:
    results = [
        made(name, ((10,), (5, right)), seed=seed, dataset=dataset)
        for dataset in ("digits", "toy")
        for name, right in (("ahead", 8), ("behind", 4))
        for seed in range(8)
    ]
    (table,) = tables(comparisons(results), ["acc/sample", "maa/sample"])
    # By hand: eight blocks reach 2 / 256, and of four tests the smallest is taken four times.
    pairs = [pair for by_metric in table.contrasts for found in by_metric.values() for pair in found]
    assert [(pair.p, pair.p_holm, pair.tests) for pair in pairs] == [(2 / 256, 8 / 256, 4)] * 4


def test_less_forgetting_wins(made: Made) -> None:
    comparison = _compared(made, {"keeps": [16, 16], "forgets": [12, 12]})
    (pair,) = contrasts(comparison, "forgetting/chaudhry")
    assert pair.difference.mean < 0
    assert pair.wins == 2


def test_an_upper_bound_is_in_no_contrast(made: Made) -> None:
    results = [made("a"), made("b"), made("a (joint)", (None, (9, 9)), regime="joint")]
    pairs = contrasts(comparisons(results)[0], "acc/sample")
    assert [(pair.first, pair.second) for pair in pairs] == [("a", "b")]


def test_a_difference_by_rounding_is_a_tie(made: Made) -> None:
    # 1/3 + 2/3 equals 3/3, but their percentages in binary may differ.
    comparison = _compared(made, {"a": [7, 7], "b": [7, 7]})
    comparison.entries[0].measured[0, "numpy:0"]["acc/sample"] += 1e-12
    (pair,) = contrasts(comparison, "acc/sample")
    assert pair.ties == 2


def test_against_keeps_the_contrasts_of_one_entry(made: Made) -> None:
    comparison = _compared(made, {"a": [12], "b": [11], "c": [10]})
    assert len(against(contrasts(comparison, "acc/sample"), "b")) == 2
