from __future__ import annotations

from collections.abc import Callable

from cl_bench.report.comparison import comparisons
from cl_bench.report.tables import (
    absent,
    backbone,
    compared,
    definitions,
    mixed_provenance,
    protocol_differences,
)
from cl_bench.results.metrics import DEFINITIONS
from cl_bench.results.result import Result

Made = Callable[..., Result]


def test_what_was_compared_is_one_sentence(made: Made) -> None:
    (comparison,) = comparisons([made(seed=2), made(seed=1)])
    assert compared(comparison) == (
        "digits: 2 classes in 2 experiences, 20 test images; backbone vision_transformer (depth=2), "
        "seeded random weights: no pre-training; "
        f"seeds 1, 2; class order identity; protocol {comparison.fingerprint}."
    )


def test_pretrained_weights_are_named_by_their_hash() -> None:
    described = {"model": "vit.tag", "options": {}, "weights": "pretrained", "weights_sha256": "0123456789ab"}
    assert backbone({"backbone": described}) == "vit.tag, pretrained weights, sha256 01234567"


def test_weights_from_a_file_are_not_called_random() -> None:
    described = {"model": "vit", "weights": "file", "weights_sha256": "0123456789ab"}
    assert backbone({"backbone": described}) == "vit, weights from a file, sha256 01234567"


def test_protocols_that_differ_name_the_field_and_both_values(made: Made) -> None:
    found = comparisons([made(), made(identity={"image_size": 64})])
    values = {comparison.identity["image_size"]: comparison.fingerprint for comparison in found}
    (sentence,) = protocol_differences(found)
    assert "digits-T2 was run under 2 protocols" in sentence
    assert "image_size (" in sentence
    assert f"32 in {values[32]}" in sentence
    assert f"64 in {values[64]}" in sentence
    assert "backbone" not in sentence


def test_one_protocol_has_no_differences(made: Made) -> None:
    assert protocol_differences(comparisons([made(), made(seed=2)])) == []


def test_runs_that_did_not_finish_are_named_with_their_error(made: Made) -> None:
    results = [
        made(seed=1),
        made(seed=2, status="failed", error="OSError: no space left"),
        made(seed=3, status="running", counts=((9,),), length=2),
    ]
    assert absent(comparisons(results)[0]) == [
        "LoRA (merge), seed 2, class order identity: failed: OSError: no space left",
        "LoRA (merge), seed 3, class order identity: running: 1 of 2 experiences evaluated",
    ]


def test_a_seed_that_only_others_have_is_missing(made: Made) -> None:
    results = [made(seed=1), made(seed=2), made("NCM", seed=1)]
    assert absent(comparisons(results)[0]) == ["seed 2, class order identity: no result of NCM"]


def test_copies_are_counted(made: Made) -> None:
    assert absent(comparisons([made(), made()])[0]) == ["1 result file repeating a cell already counted"]


def test_finished_files_of_one_cell_with_unequal_counts_disagree(made: Made) -> None:
    found = comparisons([made(), made(counts=((9,), (6, 8))), made(seed=2), made(seed=2)])[0]
    assert absent(found) == [
        "LoRA (merge), seed 1, class order identity: disagreeing: finished result files of this cell have "
        "unequal counts",
        "1 result file repeating a cell already counted",
    ]


def test_mixed_devices_and_versions_are_counted(made: Made) -> None:
    results = [
        made(seed=1),
        made(seed=2),
        made(seed=3, provenance={"device": "NVIDIA H200", "versions": {"torch": "2.6.0"}, "started": "now"}),
        made(seed=4, provenance={"device": "another"}, status="failed"),
    ]
    assert mixed_provenance(comparisons(results)[0]) == [
        "device cpu (x86_64) (2), NVIDIA H200 (1)",
        "versions.torch 2.15.0 (2), 2.6.0 (1)",
        "LoRA (merge): seconds and memory are those of 2 runs on cpu (x86_64) only",
    ]


def test_runs_of_one_machine_have_no_mixed_provenance(made: Made) -> None:
    assert mixed_provenance(comparisons([made(seed=1), made(seed=2)])[0]) == []


def test_definitions_are_those_of_the_metrics() -> None:
    assert definitions(["bwt/gem"]) == [f"bwt/gem: {DEFINITIONS['bwt/gem']}"]
