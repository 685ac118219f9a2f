import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import confusion_matrix

from cl_bench.artifacts.confusion import between_classes, between_experiences


def drawn(images: int = 200, classes: int = 6) -> pd.DataFrame:
    """Labels and predictions of two evaluations, drawn at random; an experience brings two classes."""
    generator = np.random.default_rng(0)
    label, prediction = generator.integers(classes, size=(2, 2 * images))
    return pd.DataFrame(
        {
            "after": np.repeat([1, 2], images),
            "label": label,
            "prediction": prediction,
            "experience": label // 2,
            "predicted_experience": prediction // 2,
        }
    )


def test_confusion_between_classes_is_that_of_scikit_learn() -> None:
    table = drawn()
    for after, own in table.groupby("after"):
        expected = confusion_matrix(own["label"], own["prediction"])
        np.testing.assert_array_equal(between_classes(table, after), expected)


def test_confusion_between_experiences_sums_the_blocks_of_their_classes() -> None:
    table = drawn()
    blocks = between_classes(table, 2).reshape(3, 2, 3, 2).sum(axis=(1, 3))
    np.testing.assert_array_equal(between_experiences(table, 2), blocks)


def test_an_experience_of_the_table_that_was_never_evaluated_is_named() -> None:
    with pytest.raises(ValueError, match="no evaluation after experience 0: choose among 1, 2"):
        between_classes(drawn(), 0)
