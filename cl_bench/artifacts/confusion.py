"""Confusion matrices of kept predictions: how many images of one class or experience are placed in another.

Both functions depend only on a table as :mod:`cl_bench.artifacts.predictions` describes it. Rows are the
truth, columns the predictions. Nothing here needs torch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

Counts = npt.NDArray[np.int64]


def between_classes(table: pd.DataFrame, after: int) -> Counts:
    """Return the images of each class (rows) by predicted class (columns) after experience ``after``.

    The matrix (C, C) ends with the last class that has an image or a prediction. Its diagonal holds the
    correct images.

    Raises:
        ValueError: If the table has no such evaluation.

    >>> table = pd.DataFrame({"after": [0, 1, 1, 1], "label": [0, 0, 0, 1], "prediction": [0, 1, 0, 1]})
    >>> between_classes(table, after=1)
    array([[1, 1],
           [0, 1]])
    """
    return _counted(table, after, "label", "prediction")


def between_experiences(table: pd.DataFrame, after: int) -> Counts:
    """Return the images of each experience (rows) by experience of the prediction (columns).

    The matrix (k, k) ends with the last experience seen. Its diagonal holds the images whose predicted class,
    right or wrong, is of their own experience.

    Raises:
        ValueError: If the table has no such evaluation.
    """
    return _counted(table, after, "experience", "predicted_experience")


def _counted(table: pd.DataFrame, after: int, truth: str, predicted: str) -> Counts:
    own = table[table["after"] == after]
    if own.empty:
        evaluated = ", ".join(map(str, sorted(set(table["after"]))))
        raise ValueError(f"The table has no evaluation after experience {after}: choose among {evaluated}.")
    size = 1 + int(own[[truth, predicted]].to_numpy().max())
    found = np.zeros((size, size), dtype=np.int64)
    np.add.at(found, (own[truth].to_numpy(), own[predicted].to_numpy()), 1)
    return found
