from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest, chi2

from cl_bench.artifacts.predictions import (
    Paired,
    accuracies,
    file_of,
    mcnemar,
    read,
    recency,
    task_id_accuracy,
    write,
)
from cl_bench.results.result import Protocol, Result, Row

COLUMNS = {
    "after": np.array([1, 1, 1]),
    "sample": np.array([2, 0, 1]),
    "label": np.array([2, 0, 1]),
    "experience": np.array([1, 0, 0]),
    "prediction": np.array([2, 0, 3]),
    "predicted_experience": np.array([1, 0, 1]),
    "within": np.array([2, 0, 1]),
    "top5": np.array([[2, 3, 1, 0], [0, 1, 2, 3], [3, 1, 0, 2]]),
    "probability": np.array([0.5, 0.75, 1.0]),
}


def result(correct: list[int]) -> Result:
    """Two experiences of two classes, only the last of which was evaluated."""
    row = Row(correct, correct_within_experience=[1, 1, 1, 0], correct_experience=[1, 0, 1, 0])
    return Result(
        strategy="LoRA",
        dataset="toy",
        experiences=[(0, 2), (2, 4)],
        class_names=list("abcd"),
        test_images=[1, 1, 1, 1],
        order="identity",
        seed=1,
        regime="joint",
        protocol=Protocol({}, {}, {}),
        rows=[None, row],
    )


def hits(first: int, second: int, both: int = 5, samples: int = 100) -> list[pd.DataFrame]:
    """Two models, each right on ``both`` images and on as many more as are given, none of them shared."""
    table = pd.DataFrame({"after": 3, "sample": range(samples), "label": 1})
    places = np.arange(samples)
    only_first = (places >= both) & (places < both + first)
    only_second = (places >= both + first) & (places < both + first + second)
    return [table.assign(prediction=((places < both) | own).astype(int)) for own in (only_first, only_second)]


def test_what_is_written_is_read_again_sorted_by_sample(tmp_path: Path) -> None:
    result([1, 0, 1, 0]).write(tmp_path)
    write(file_of(tmp_path, 1), COLUMNS)
    table = read(tmp_path)
    assert list(table) == list(COLUMNS)
    assert table["sample"].tolist() == [0, 1, 2]
    assert table["prediction"].tolist() == [0, 3, 2]
    assert table["top5"].map(list).tolist() == [[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]]
    assert table["probability"].tolist() == [0.75, 1.0, 0.5]


def test_predictions_that_do_not_add_up_to_the_counts_are_refused(tmp_path: Path) -> None:
    result([1, 1, 1, 0]).write(tmp_path)
    write(file_of(tmp_path, 1), COLUMNS)
    with pytest.raises(ValueError, match="do not add up to the counts of its result"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("column", "values"),
    (
        ("prediction", [0, 10**9, 2]),
        ("prediction", [0, -1, 2]),
        ("prediction", [0, None, 2]),
        ("predicted_experience", [0, 0, 1]),
        ("sample", [0, 1, 1]),
        ("after", [1, 1, 0]),
    ),
)
def test_an_entry_that_the_stream_cannot_have_is_refused(
    tmp_path: Path, column: str, values: list[int | None]
) -> None:
    """The second image is classified wrong, so that its forged prediction changes no count."""
    result([1, 0, 1, 0]).write(tmp_path)
    path = file_of(tmp_path, 1)
    write(path, COLUMNS)
    table = pq.read_table(path)
    place, kind = table.schema.get_field_index(column), table.schema.field(column).type
    pq.write_table(table.set_column(place, column, pa.array(values, type=kind)), path)
    with pytest.raises(ValueError, match="run its cell again with --keep predictions"):
        read(tmp_path)


def test_a_cell_without_predictions_names_the_option_that_keeps_them(tmp_path: Path) -> None:
    result([1, 0, 1, 0]).write(tmp_path)
    with pytest.raises(FileNotFoundError, match="run its cell again with --keep predictions"):
        read(tmp_path)


@pytest.mark.parametrize(
    "spoilt",
    (
        lambda path: path.write_bytes(b"PAR1" + bytes(64)),
        lambda path: pq.write_table(pa.table({"sample": [1]}), path),
        lambda path: pq.write_table(pq.read_table(path).append_column("more", pa.array([1, 2, 3])), path),
    ),
    ids=("no parquet", "fewer columns", "more columns"),
)
def test_a_file_that_is_not_a_table_of_predictions_is_refused(
    tmp_path: Path, spoilt: Callable[[Path], object]
) -> None:
    result([1, 0, 1, 0]).write(tmp_path)
    path = file_of(tmp_path, 1)
    write(path, COLUMNS)
    spoilt(path)
    with pytest.raises(ValueError, match="run its cell again"):
        read(tmp_path)


def test_accuracy_of_a_class_over_time_counts_only_its_images() -> None:
    table = pd.DataFrame(
        {
            "after": [0, 0, 1, 1, 1, 1],
            "label": [0, 0, 0, 0, 1, 1],
            "experience": [0, 0, 0, 0, 1, 1],
            "prediction": [0, 0, 0, 1, 1, 1],
        }
    )
    expected = pd.DataFrame({0: [1.0, 0.5], 1: [np.nan, 1.0]})
    for by in ("label", "experience"):
        np.testing.assert_array_equal(accuracies(table, by), expected)


def test_task_id_accuracy_counts_wrong_classes_of_the_right_experience() -> None:
    assert task_id_accuracy(pd.DataFrame(COLUMNS | {"top5": 0})).to_dict() == {1: pytest.approx(2 / 3)}


def test_recency_is_the_share_of_the_newest_classes_beyond_their_images() -> None:
    shares = recency(pd.DataFrame(COLUMNS | {"top5": 0})).loc[1]
    assert shares.to_dict() == pytest.approx({"predicted": 2 / 3, "present": 1 / 3, "bias": 1 / 3})


@pytest.mark.parametrize(("first", "second"), ((0, 6), (3, 9), (12, 12)))
def test_mcnemar_of_few_images_is_the_exact_binomial_test(first: int, second: int) -> None:
    found = mcnemar(*hits(first, second))
    assert (found.only_first, found.only_second) == (first, second)
    assert found.p == pytest.approx(binomtest(first, first + second).pvalue)


def test_mcnemar_of_many_images_is_the_corrected_chi_squared_test() -> None:
    expected = chi2.sf((abs(10 - 30) - 1) ** 2 / 40, df=1)
    assert mcnemar(*hits(10, 30)).p == pytest.approx(expected)


def test_two_models_that_are_right_on_the_same_images_do_not_differ() -> None:
    assert mcnemar(*hits(0, 0)) == Paired(0, 0, p=1.0)


def test_models_that_saw_other_images_are_not_compared() -> None:
    first, second = hits(3, 4)
    with pytest.raises(ValueError, match="not the same"):
        mcnemar(first, second.assign(sample=second["sample"] + 1))


def test_mcnemar_pairs_images_by_sample_and_not_by_row() -> None:
    first, second = hits(2, 9)
    assert mcnemar(first, second.sample(frac=1, random_state=0)) == mcnemar(first, second)
