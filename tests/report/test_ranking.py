"""Rank correlations with a published table, on results whose order is known."""

from collections.abc import Callable
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from cl_bench.__main__ import main
from cl_bench.report.comparison import Comparison, comparisons
from cl_bench.report.ranking import METRICS, correlations, described, kendall, spearman
from cl_bench.results.result import Result
from cl_bench.results.tuning import Tuning

Made = Callable[..., Result]

COLUMNS = ("janus_lora", "imagenet_r", 10)
ASCENDING = (
    "lora",
    "dualprompt",
    "l2p",
    "lora_gpm",
    "coda_prompt",
    "lora_drs",
    "inflora",
    "bilora",
    "janus_lora",
)
"""The methods of the published table by their final accuracy: 64.24, 64.45, 65.99, 71.56, …, 75.78."""


STUDY = Tuning(
    strategy="any",
    dataset="digits",
    space={"rank": {"choices": [4, 8]}},
    budget={"trials": 2},
    on="first:1",
    metric="maa/sample",
    val_fraction=0.2,
    seed=0,
    order="identity",
    fixed=[],
    settings={"rank": [4, 8]},
    scores=[50.0, 60.0],
    experiences=[1, 1],
    spent={"trials": 2},
    best=1,
    runner_up=0,
    sensitivity=None,
    importance={},
)


def ranked(made: Made, stems: tuple[str, ...], seeds: int = 2) -> Comparison:
    """Results in which each method classifies one more image correctly than the one before it."""
    (comparison,) = comparisons(
        made(
            stem,
            [[10], [place, place + 1 - seed % 2]],
            seed=seed,
            config={"model": {"class_path": f"strategies.{stem}.Method"}},
        )
        for place, stem in enumerate(stems)
        for seed in range(seeds)
    )
    return comparison


def concordance(order: tuple[str, ...]) -> float:
    """Kendall's τ by its definition: concordant minus discordant pairs, over all pairs."""
    pairs = [*combinations(order, 2)]
    return sum(1 if ASCENDING.index(a) < ASCENDING.index(b) else -1 for a, b in pairs) / len(pairs)


def test_the_published_order_has_correlation_1_and_its_reverse_minus_1(made: Made) -> None:
    for order, expected in ((ASCENDING, 1.0), (ASCENDING[::-1], -1.0)):
        found = correlations(ranked(made, order), COLUMNS)[0]
        assert found.metric == METRICS[0]
        assert {*found.methods} == {*ASCENDING}
        assert found.kendall == pytest.approx(expected)
        assert found.spearman == pytest.approx(expected)
        assert abs(found.kendall_interval.high - found.kendall_interval.low) < 0.2


def test_kendall_counts_pairs_and_its_interval_is_wide_for_few_methods(made: Made) -> None:
    order = ("l2p", "lora", "janus_lora", "inflora", "lora_gpm")
    found = correlations(ranked(made, order), COLUMNS)[0]
    assert found.kendall == pytest.approx(concordance(order))
    assert found.kendall in found.kendall_interval
    assert found.kendall_interval.high - found.kendall_interval.low > 0.8


def test_correlations_with_ties_equal_those_of_scipy() -> None:
    x, y = np.random.default_rng(0).integers(0, 5, (2, 50, 8)).astype(float)
    one = [float(kendalltau(*pair).statistic) for pair in zip(x, y, strict=True)]
    other = [float(spearmanr(*pair).statistic) for pair in zip(x, y, strict=True)]
    assert kendall(x, y) == pytest.approx(one)
    assert spearman(x, y) == pytest.approx(other)
    assert np.isnan(kendall(x[:1], np.ones((1, 8))))


def test_joint_training_and_unknown_methods_do_not_count(made: Made) -> None:
    comparison = ranked(made, (*ASCENDING[:4], "first_session", "ncm"))
    assert correlations(comparison, COLUMNS)[0].methods == tuple(reversed(ASCENDING[:4]))


def test_a_method_with_two_settings_is_refused(made: Made) -> None:
    first, second = (ranked(made, ASCENDING[:5]).results for _ in range(2))
    for result in second:
        result.config = result.config | {"seed": 0, "rank": 4}
    (comparison,) = comparisons([*first, *second])
    with pytest.raises(ValueError, match="one method with two settings"):
        correlations(comparison, COLUMNS)


def test_tuned_rows_have_a_correlation_of_their_own(made: Made) -> None:
    as_they_are, tuned = (ranked(made, order).results for order in (ASCENDING, ASCENDING[::-1]))
    for result in tuned:
        result.config = result.config | {"tuned": True}
        result.provenance |= {"settings": "tuned", "tuning": asdict(STUDY)}
    (comparison,) = comparisons([*as_they_are, *tuned])
    found = [correlations(comparison, COLUMNS, tuned=tuned)[0].kendall for tuned in (False, True)]
    assert found == pytest.approx([1, -1])
    paragraphs = described(comparison, COLUMNS).split("\n\nRank")
    assert ["tuned here" in paragraph for paragraph in paragraphs] == [False, True]


def test_three_methods_are_refused_with_those_that_are_missing(made: Made) -> None:
    with pytest.raises(ValueError, match=r"shares 3 methods .* needs 4: run more of .*janus_lora"):
        correlations(ranked(made, ASCENDING[:3]), COLUMNS)


@pytest.mark.parametrize(
    ("columns", "error"),
    (
        (["janus_lora", "imagenet_r", "11"], "Did you mean janus_lora imagenet_r 10?"),
        (["janus_lora", "imagenet_r", "ten"], "T of --published cannot be 'ten'"),
    ),
)
def test_an_unknown_table_is_refused(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], columns: list[str], error: str
) -> None:
    made().write(tmp_path / "one")
    assert main(["report", str(tmp_path), "--published", *columns]) == 2
    assert error in capsys.readouterr().err


def test_the_report_prints_the_correlations_after_its_tables(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for result in ranked(made, ASCENDING).results:
        result.write(tmp_path / result.strategy / str(result.seed))
    assert main(["report", str(tmp_path), "--published", *map(str, COLUMNS)]) == 0
    text = (tmp_path / "report" / "table.md").read_text(encoding="utf-8")
    assert (
        "* ACC: Kendall's τ +1.00 [+" in text.partition("Rank correlation of digits-T2 with janus_lora's")[2]
    )
    assert text.rstrip() == capsys.readouterr().out.rstrip()


def test_a_comparison_without_a_rank_correlation_leaves_the_others(made: Made, tmp_path: Path) -> None:
    for result in ranked(made, ASCENDING).results:
        result.write(tmp_path / result.strategy / str(result.seed))
    made("other", [[10], [3, 4], [3, 3, 4]]).write(tmp_path / "other")
    assert main(["report", str(tmp_path), "--published", *map(str, COLUMNS)]) == 0
    text = (tmp_path / "report" / "table.md").read_text(encoding="utf-8")
    assert "Rank correlation of digits-T2 with" in text
    assert "No rank correlation of digits-T3: digits-T3 shares 0 methods with the table" in text
