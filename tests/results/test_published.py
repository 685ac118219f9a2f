from __future__ import annotations

import math

import pytest

from cl_bench.results.metrics import DEFINITIONS
from cl_bench.results.published import by_source, published, reconstructed, rows, sizes, sources
from cl_bench.run.configs import stems_of


def _mean(method: str, dataset: str, length: int, metric: str) -> float:
    (row,) = (
        row
        for row in published()
        if (row.source.name, row.method, row.setting) == ("janus_lora", method, "")
        and (row.dataset, row.num_experiences, row.metric) == (dataset, length, metric)
    )
    return row.mean


def test_numbers_are_those_printed() -> None:
    # Read off the tables of JANUS-LoRA by hand: corners and middle.
    assert _mean("Fine-Tuning", "imagenet_r", 5, "acc/sample") == 69.75
    assert _mean("LoRA-GPM", "imagenet_r", 10, "bwt/gem") == -10.95
    assert _mean("Janus-LoRA", "imagenet_r", 20, "maa/sample") == 77.11
    assert _mean("Janus-LoRA", "domainnet", 5, "bwt/gem") == -7.74
    assert _mean("InfLoRA", "cifar100", 10, "acc/sample") == 86.69


def test_every_number_has_an_existing_metric_and_strategy() -> None:
    strategies = {"", *stems_of("strategies")}
    for row in published():
        assert row.metric in DEFINITIONS
        assert row.strategy in strategies
        assert math.isnan(row.std) or row.std >= 0
        assert sizes(row.dataset) is not None


def test_the_ablation_ends_in_the_row_of_the_main_table() -> None:
    full = {row.metric: row.mean for row in published() if row.setting == "OE+GR+DML"}
    assert full == {
        metric: _mean("Janus-LoRA", "imagenet_r", 10, metric)
        for metric in ("acc/sample", "maa/sample", "bwt/gem")
    }


def test_a_suspicious_row_carries_its_note() -> None:
    (row,) = (
        row
        for row in published()
        if (row.method, row.num_experiences, row.metric) == ("DualPrompt", 20, "acc/sample")
        and row.source.name == "janus_lora"
    )
    assert "probably a slip" in row.note


def test_rows_of_a_strategys_own_source_come_first() -> None:
    names = list(by_source(rows("inflora", "imagenet_r", 10)))
    assert names[:2] == ["inflora", "inflora_logs"]
    assert "janus_lora" in names[2:]


def test_an_unknown_number_is_an_error_that_lists_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"on imagenet_r with 7 .*Known are: imagenet_r with 5, imagenet_r with 10"
    ):
        rows("janus_lora", "imagenet_r", 7)
    with pytest.raises(ValueError, match=r"Choose among bilora, .*inflora, janus_lora"):
        rows("ncm", "imagenet_r", 10)


def test_what_is_reconstructed_is_listed() -> None:
    assert len(reconstructed("janus_lora")) == 4
    assert reconstructed("inflora") == ()


def test_a_source_states_its_number_of_runs() -> None:
    assert (sources()["janus_lora"].runs, sources()["sd_lora"].spread) == (5, "standard error")
