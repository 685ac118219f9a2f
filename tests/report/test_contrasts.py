from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import scipy.stats

from cl_bench.report.comparison import Comparison, comparisons
from cl_bench.report.contrasts import Contrast, against, contrasts, corrected
from cl_bench.report.tables import tables
from cl_bench.results.result import Result

Made = Callable[..., Result]


def _compared(made: Made, finals: dict[str, Sequence[int]]) -> Comparison:
    """Strategies by the number of images right at the end in each block, of twenty."""
    results = [
        made(name, ((10,), (right // 2, right - right // 2)), seed=block % 5, order=f"numpy:{block // 5}")
        for name, counts in finals.items()
        for block, right in enumerate(counts)
    ]
    (comparison,) = comparisons(results)
    return comparison


def _alone(comparison: Comparison, metric: str = "acc/sample") -> list[Contrast]:
    """Contrasts of a table that holds this benchmark and this metric only."""
    return corrected([{metric: contrasts(comparison, metric)}])[0][metric]


def test_the_difference_is_paired_by_seed_and_order(made: Made) -> None:
    first, second = [14, 10, 18, 12, 16], [13, 9, 16, 11, 14]
    (pair,) = contrasts(_compared(made, {"a": first, "b": second}), "acc/sample")
    theirs = scipy.stats.ttest_rel(np.multiply(first, 5.0), np.multiply(second, 5.0)).confidence_interval()
    interval = pair.difference.interval
    assert (interval.low, interval.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert (pair.wins, pair.ties, pair.losses) == (5, 0, 0)


def test_a_planted_difference_is_found_where_unpaired_spread_would_hide_it(made: Made) -> None:
    easy_and_hard = [2, 18, 6, 14, 10, 8, 16, 4]
    comparison = _compared(made, {"ahead": [right + 2 for right in easy_and_hard], "behind": easy_and_hard})
    (pair,) = _alone(comparison)
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


def test_few_blocks_are_said_to_be_few(made: Made) -> None:
    def verdict(blocks: int) -> str:
        counts = [10, 11, 12, 13, 14, 15][:blocks]
        comparison = _compared(made, {"a": [right + 2 for right in counts], "b": counts})
        return _alone(comparison)[0].verdict

    assert verdict(1) == "n too small"
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
    assert [pair.p_holm for pair in _alone(comparison)] == pytest.approx([6 / 64] * 3)
    assert {pair.verdict for pair in _alone(comparison)} == {
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


def test_an_upper_bound_competes_with_nobody(made: Made) -> None:
    results = [made("a"), made("b"), made("a (joint)", (None, (9, 9)), regime="joint")]
    pairs = contrasts(comparisons(results)[0], "acc/sample")
    assert [(pair.first, pair.second) for pair in pairs] == [("a", "b")]


def test_what_differs_by_rounding_is_a_tie(made: Made) -> None:
    # 1/3 + 2/3 and 3/3 are one number to a reader; in binary their percentages are not.
    comparison = _compared(made, {"a": [7, 7], "b": [7, 7]})
    comparison.entries[0].measured[0, "numpy:0"]["acc/sample"] += 1e-12
    (pair,) = contrasts(comparison, "acc/sample")
    assert pair.ties == 2


def test_one_side_of_the_pairs_can_be_asked_for(made: Made) -> None:
    comparison = _compared(made, {"a": [12], "b": [11], "c": [10]})
    assert len(against(contrasts(comparison, "acc/sample"), "b")) == 2
