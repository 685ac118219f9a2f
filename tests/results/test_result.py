import json
import math
from pathlib import Path

import numpy as np
import pytest

from cl_bench.results.result import FILE_NAME, Cost, Protocol, Result, Row, digest, read, read_all


@pytest.fixture
def result() -> Result:
    """Two experiences of two classes, with 10, 20, 30 and 40 test images."""
    return Result(
        strategy="LoRA (merge)",
        dataset="digits",
        experiences=[(0, 2), (2, 4)],
        class_names=["zero", "one", "two", "three"],
        test_images=[10, 20, 30, 40],
        order="identity",
        seed=1,
        regime="sequential",
        protocol=Protocol({"precision": "32-true"}, {"seed": 1}, {"dataset": "digits"}),
        config={"seed": 1, "order": "identity", "rank": 4},
        rows=[
            Row([9, 18], [9, 18], [10, 20]),
            Row([5, 10, 30, 20], [8, 16, 30, 30], [6, 12, 30, 25]),
        ],
        costs=[Cost({"training": 1.5}, 10, 20, 30), Cost({"training": 2.0, "evaluation": 0.5}, 10, 20, 30)],
    )


def test_counts_are_summed_over_the_classes_of_an_experience(result: Result) -> None:
    np.testing.assert_equal(result.counts("correct"), [[27, np.nan], [15, 50]])
    np.testing.assert_equal(result.totals, [30, 70])


def test_final_accuracy_is_weighted_by_images_or_by_experiences(result: Result) -> None:
    values = result.metrics()
    assert values["acc/sample"] == pytest.approx(65.0)
    assert values["acc/experience"] == pytest.approx((50.0 + 500 / 7) / 2)
    assert values["bwt/gem"] == pytest.approx(50.0 - 90.0)


def test_metrics_after_an_experience_are_those_of_the_shorter_stream(result: Result) -> None:
    assert result.metrics_after(0)["acc/sample"] == pytest.approx(90.0)


def test_a_written_result_reads_back_equal(result: Result, tmp_path: Path) -> None:
    result.write(tmp_path)
    assert read(tmp_path / FILE_NAME) == result
    assert read_all(tmp_path) == ([result], [])


def test_an_older_file_without_diagnostics_is_read(result: Result, tmp_path: Path) -> None:
    path = result.write(tmp_path)
    payload = json.loads(path.read_text())
    del payload["diagnostics"]
    path.write_text(json.dumps(payload))
    assert read(path) == result


def test_writing_leaves_one_file_and_a_failed_write_keeps_the_old_one(result: Result, tmp_path: Path) -> None:
    result.write(tmp_path)
    before = (tmp_path / FILE_NAME).read_bytes()
    result.provenance["broken"] = object()
    with pytest.raises(TypeError):
        result.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_the_joint_regime_fills_only_the_last_row(result: Result) -> None:
    result.regime, result.rows = "joint", [None, result.rows[1]]
    values = result.metrics()
    assert values["acc/sample"] == pytest.approx(65.0)
    assert all(math.isnan(values[name]) for name in ("maa/sample", "bwt/gem", "forgetting/chaudhry"))


def test_seed_and_order_make_another_cell_of_the_same_group(result: Result) -> None:
    cell, group = result.cell, result.group
    result.config |= {"seed": 2, "order": "numpy:1993"}
    assert result.cell != cell
    assert result.group == group
    result.config["rank"] = 8
    assert result.group != group


def test_phases_add_up_over_experiences(result: Result) -> None:
    assert result.seconds() == {"training": 3.5, "evaluation": 0.5}


def test_spending_leaves_out_diagnostics_and_what_was_not_measured(result: Result) -> None:
    result.costs[0].seconds["diagnostics"] = 100.0
    spent = result.spending()
    assert (spent["seconds"], spent["seconds/training"]) == (4.0, 3.5)
    assert math.isnan(spent["seconds/checkpoints"])
    result.costs = []
    assert all(map(math.isnan, result.spending().values()))


def test_the_fingerprint_covers_the_identity_and_nothing_else() -> None:
    one = Protocol({"precision": "32-true"}, {"seed": 1}, {"dataset": "digits"})
    other_seed = Protocol({"precision": "32-true"}, {"seed": 2}, {"dataset": "digits"})
    other_precision = Protocol({"precision": "bf16-mixed"}, {"seed": 1}, {"dataset": "digits"})
    assert one.fingerprint == other_seed.fingerprint != other_precision.fingerprint


def test_digest_is_the_documented_hash() -> None:
    import hashlib

    assert (
        digest({"b": [1, "é"], "a": None}) == hashlib.sha256(b'{"a":null,"b":[1,"\\u00e9"]}').hexdigest()[:8]
    )


def test_a_foreign_file_and_another_schema_are_errors(result: Result, tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_text("not json")
    with pytest.raises(ValueError, match="it is not JSON"):
        read(path)
    path = result.write(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(ValueError, match="schema 99"):
        read(path)


def test_unreadable_files_are_returned_with_the_results(result: Result, tmp_path: Path) -> None:
    result.write(tmp_path / "good")
    for name, content in (("text", b"no json"), ("bytes", b"\xff\xfe"), ("empty", b'{"schema": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE_NAME).write_bytes(content)
    results, unreadable = read_all(tmp_path)
    assert results == [result]
    assert len(unreadable) == 3
    assert all(line.endswith("; run its cell again, or remove the file.") for line in unreadable)


def test_a_result_file_has_the_permissions_of_any_other(result: Result, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    assert result.write(tmp_path).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_missing_results_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no results folder"):
        list(read_all(tmp_path / "absent"))


def test_an_older_file_without_later_fields_is_read(result: Result, tmp_path: Path) -> None:
    path = result.write(tmp_path)
    payload = json.loads(path.read_text())
    for name in ("diagnostics", "domains", "domain_images", "training_data"):
        del payload[name]
    for row in payload["rows"]:
        del row["correct_by_domain"]
    path.write_text(json.dumps(payload))
    assert read(path) == result
