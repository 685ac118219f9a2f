"""Confusion matrices of kept predictions: how many images of one class or experience are placed in another.

Rows are the truth, columns the predictions. Functions of a table depend on nothing else; tables are described
in :mod:`cl_bench.artifacts.predictions`. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cl_bench.artifacts import PREDICTIONS
from cl_bench.errors import sentence, visible
from cl_bench.results.result import FILE_NAME, Result, result_files
from cl_bench.results.result import read as read_result

if TYPE_CHECKING:  # slow to import
    import pandas as pd

Counts = npt.NDArray[np.int64]

MOST_CLASSES = 40
"""Classes up to which the confusion between them can be read."""


@dataclass(frozen=True, eq=False)
class Confusion:
    """The confusion of a cell after its last experience.

    Attributes:
        result: The result of the cell.
        experiences: Images of each experience by experience of the prediction (T, T).
        classes: Images of each class by predicted class (C, C); None for more than ``MOST_CLASSES``.
    """

    result: Result
    experiences: Counts
    classes: Counts | None

    @property
    def matrices(self) -> tuple[Counts, ...]:
        """The matrices that there are, that of experiences first."""
        return (self.experiences,) if self.classes is None else (self.experiences, self.classes)


def placed(counts: Sequence[Counts]) -> npt.NDArray[np.float64]:
    """Return which share of each row of ``counts`` is in each column, in percent, as a mean over runs (n, n).

    A row without images is NaN.

    >>> placed([np.array([[1, 1], [0, 4]]), np.array([[3, 1], [1, 3]])])
    array([[62.5, 37.5],
           [12.5, 87.5]])
    """
    with np.errstate(invalid="ignore"):
        shares = [100 * one / one.sum(axis=1, keepdims=True) for one in counts]
    return np.asarray(np.mean(shares, axis=0))


def confusion_of(folder: Path) -> Confusion | None:
    """Return the confusion of the cell in ``folder``, or None if it has kept no predictions.

    Raises:
        ValueError: If its predictions are not those of its result.
        OSError: If a file cannot be opened.
    """
    if not (folder / PREDICTIONS).is_dir():
        return None
    from cl_bench.artifacts.predictions import read  # imports pyarrow, which few reports need

    result, table = read_result(folder / FILE_NAME), read(folder)
    after = int(table["after"].max())
    few = len(result.class_names) <= MOST_CLASSES
    return Confusion(
        result, between_experiences(table, after), between_classes(table, after) if few else None
    )


def confusions_below(folder: Path) -> Iterator[Confusion | str]:
    """Yield the confusion of every finished cell below ``folder`` that has one, or why it cannot be read."""
    for path in sorted(result_files(folder, [])):
        try:
            found = confusion_of(path.parent)
        except Exception as error:  # of any class: Arrow reads files that nobody foresaw
            yield visible(f"{path.parent / PREDICTIONS}: {sentence(error)}")
            continue
        if found is not None and found.result.status == "done":
            yield found


def between_classes(table: pd.DataFrame, after: int) -> Counts:
    """Return the images of each class (rows) by predicted class (columns) after experience ``after``.

    The matrix (C, C) ends with the last class that has an image or a prediction. Its diagonal holds the
    correct images.

    Raises:
        ValueError: If the table has no such evaluation.

    >>> import pandas as pd
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
