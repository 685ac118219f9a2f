"""What a run predicted for every test image after every experience: the table, its files, numbers from it.

The table has a row for each image and evaluation, with these columns:

========================  =======================================================================
``after``                 index of the experience after which the image was evaluated
``sample``                index of the image among those evaluated on, in the order of the dataset
``label``                 its class, as every class here a position in the class order
``experience``            index of the experience that brought this class
``prediction``            predicted class, among all classes seen
``predicted_experience``  index of the experience that brought the predicted class
``within``                predicted class if only those of the image's own experience compete
``top5``                  the five classes with the largest logits, or fewer if fewer were seen
``probability``           softmax of the logits at the prediction
``domain``                index of the image's domain; missing if the dataset has none
``logits``                logits of all classes seen; missing unless they were asked for
========================  =======================================================================

Indices count from 0. A head of cosines or distances gives logits that are not log-probabilities, so their
softmax means little. Each function below depends only on a table. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cl_bench.artifacts import PREDICTIONS
from cl_bench.results.files import replaced
from cl_bench.results.result import FILE_NAME, Result, Row
from cl_bench.results.result import read as read_result

_COLUMNS = {
    "after": pa.int16(),
    "sample": pa.int32(),
    "label": pa.int32(),
    "experience": pa.int16(),
    "prediction": pa.int32(),
    "predicted_experience": pa.int16(),
    "within": pa.int32(),
    "top5": pa.list_(pa.int32()),
    "probability": pa.float32(),
}
_CLASSES = ("label", "prediction", "within")
_OPTIONAL = {"domain": pa.int16(), "logits": pa.list_(pa.float32())}


def file_of(folder: Path, after: int) -> Path:
    """Return the file of the predictions after experience ``after``, counted from 0, in a cell's folder."""
    return folder / PREDICTIONS / f"experience{after + 1}.parquet"


def write(path: Path, columns: Mapping[str, Any], require: Callable[[], None] = lambda: None) -> None:
    """Write one evaluation, atomically, its rows sorted by ``sample``.

    Args:
        path: The file, as :func:`file_of` names it.
        columns: Arrays (N,) by the name of their column, and (N, k) for columns of lists.
        require: Called before the file replaces an earlier one; what it raises keeps that.

    Raises:
        OSError: If it cannot be written; the old file is kept.
    """
    order = np.argsort(columns["sample"], kind="stable")
    types = {name: kind for name, kind in (_COLUMNS | _OPTIONAL).items() if name in columns}
    arrays = [_array(columns[name][order], kind) for name, kind in types.items()]
    with replaced(path, require) as file:
        pq.write_table(pa.Table.from_arrays(arrays, names=list(types)), file)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    """Return numbers (N,), or lists (N, k) of them, as Arrow holds them."""
    if values.ndim == 1:
        return pa.array(values, type=kind)
    number, length = values.shape
    ends = np.arange(0, (number + 1) * length, length, dtype=np.int32)
    return pa.ListArray.from_arrays(ends, pa.array(values.reshape(-1), type=kind.value_type))


def has_logits(path: Path) -> bool:
    """Return whether a file of predictions holds logits."""
    return "logits" in pq.read_schema(path).names


def read(folder: Path) -> pd.DataFrame:
    """Return the table of the cell in ``folder``, sorted by ``after`` and ``sample``.

    Raises:
        FileNotFoundError: If the cell has kept no predictions.
        ValueError: If they are not those of its result: other columns, missing experiences, other counts.
    """
    result = read_result(folder / FILE_NAME)
    evaluated = [after for after, row in enumerate(result.rows) if row is not None]
    files = [file_of(folder, after) for after in evaluated]
    if not any(file.is_file() for file in files):
        raise FileNotFoundError(
            f"{folder} has no predictions: remove the folder and run its cell again with --keep predictions."
        )
    missing = [str(after + 1) for after, file in zip(evaluated, files, strict=True) if not file.is_file()]
    if missing:
        raise ValueError(
            f"{folder} has no predictions after experience {', '.join(missing)}: remove the folder and run "
            "its cell again with --keep predictions."
        )
    table = pd.concat([_read(file, after) for after, file in zip(evaluated, files, strict=True)])
    table = table.reset_index(drop=True)
    if not _fits(table, result) or rows(table, result) != result.rows:
        raise ValueError(
            f"The predictions in {folder} do not add up to the counts of its result, so they are of another "
            "run: remove the folder and run its cell again with --keep predictions."
        )
    return table


def _read(file: Path, after: int) -> pd.DataFrame:
    """Return the content of a file, if it is the evaluation after experience ``after``."""
    try:
        table = pq.read_table(file, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a Parquet file: run its cell again. ({error})") from error
    found = dict(zip(table.schema.names, table.schema.types, strict=True))
    expected = {name: kind for name, kind in (_COLUMNS | _OPTIONAL).items() if name in found}
    if found != expected or not _COLUMNS.keys() <= found.keys():
        raise ValueError(
            f"{file} has other columns than this version writes: run its cell again with --keep predictions."
        )
    frame = table.replace_schema_metadata().to_pandas()
    if (frame["after"] != after).any():
        raise ValueError(f"{file} is of another experience: run its cell again with --keep predictions.")
    return frame


def _fits(table: pd.DataFrame, result: Result) -> bool:
    """Whether every entry is one that the stream of ``result`` can have, so that all functions take it."""
    owner = np.repeat(np.arange(result.num_experiences), [stop - start for start, stop in result.experiences])
    bounds = {name: np.array([stop for _, stop in result.experiences])[table["after"]] for name in _CLASSES}
    bounds |= {"domain": len(result.domains)} if result.domains else {}
    return bool(
        not table.isna().any(axis=None)
        and bounds.keys() <= {*table}
        and all(table[name].ge(0).all() and table[name].lt(bound).all() for name, bound in bounds.items())
        and (owner[table["label"]] == table["experience"]).all()
        and (owner[table["prediction"]] == table["predicted_experience"]).all()
        and not table.duplicated(["after", "sample"]).any()
    )


def rows(table: pd.DataFrame, result: Result) -> list[Row | None]:
    """Return the counts of every evaluation in ``table``, as the run itself has counted them.

    Args:
        table: Predictions.
        result: Gives classes, experiences and domains of the stream; its own counts are not read.
    """
    found: list[Row | None] = []
    for after, own in table.groupby("after"):
        found += [None] * (after - len(found))
        found.append(_row(own, result.experiences[after][1], len(result.domains)))
    return found


def _row(own: pd.DataFrame, seen: int, domains: int) -> Row:
    """Return the counts of one evaluation over ``seen`` classes."""

    def counts(hit: pd.Series) -> list[int]:
        listed: list[int] = np.bincount(own["label"][hit], minlength=seen).tolist()
        return listed

    correct = own["prediction"] == own["label"]
    return Row(
        correct=counts(correct),
        correct_within_experience=counts(own["within"] == own["label"]),
        correct_experience=counts(own["predicted_experience"] == own["experience"]),
        correct_by_domain=[counts(correct & (own["domain"] == domain)) for domain in range(domains)],
    )


def accuracies(table: pd.DataFrame, by: str = "experience") -> pd.DataFrame:
    """Return the accuracy, a fraction, after each experience (rows) for each value of a column (columns).

    By ``experience`` it is the accuracy matrix, by ``label`` the accuracy of every class over time, by
    ``domain`` that of every domain. NaN where no image was evaluated.

    >>> table = pd.DataFrame(
    ...     {"after": [0, 1, 1, 1], "label": [0, 0, 1, 1], "prediction": [0, 1, 1, 0]}
    ... )
    >>> accuracies(table, by="label").loc[1].to_dict()
    {0: 0.0, 1: 0.5}
    """
    correct = (table["prediction"] == table["label"]).astype(float)
    return correct.groupby([table["after"], table[by]]).mean().unstack()


def task_id_accuracy(table: pd.DataFrame) -> pd.Series:
    """Return the fraction of images whose predicted class is of their own experience, by ``after``.

    >>> table = pd.DataFrame({"after": [1, 1], "experience": [0, 1], "predicted_experience": [1, 1]})
    >>> task_id_accuracy(table).to_dict()
    {1: 0.5}
    """
    placed = table["predicted_experience"] == table["experience"]
    return placed.groupby(table["after"]).mean()


def recency(table: pd.DataFrame) -> pd.DataFrame:
    """Return how often the newest classes are predicted, by ``after``.

    ``predicted`` is the fraction of all images that are placed in the newest experience, ``present`` the
    fraction that belongs there. The bias to what was learnt last is their difference.

    >>> table = pd.DataFrame(
    ...     {"after": [1] * 4, "experience": [0, 0, 0, 1], "predicted_experience": [0, 1, 1, 1]}
    ... )
    >>> recency(table).loc[1].to_dict()
    {'predicted': 0.75, 'present': 0.25, 'bias': 0.5}
    """
    newest = table["after"]
    shares = pd.DataFrame(
        {
            "predicted": (table["predicted_experience"] == newest).groupby(newest).mean(),
            "present": (table["experience"] == newest).groupby(newest).mean(),
        }
    )
    return shares.assign(bias=shares["predicted"] - shares["present"])


class Paired(NamedTuple):
    """McNemar's test of two models on the same images.

    Attributes:
        only_first: Images that only the first model classifies right.
        only_second: Images that only the second does.
        p: Two-sided p-value of equal accuracy: exact below 25 such images, otherwise by chi-squared with
            continuity correction.
    """

    only_first: int
    only_second: int
    p: float


def mcnemar(first: pd.DataFrame, second: pd.DataFrame) -> Paired:
    """Compare two models on the images of their last evaluations, each of which both have classified.

    The test is about two trained models. Whether two methods differ is a question about several seeds and
    class orders, which ``cl-bench report`` answers.

    Source: McNemar, https://doi.org/10.1007/BF02295996, as statsmodels computes it.

    Raises:
        ValueError: If the two did not classify the same images.

    >>> first = pd.DataFrame({"after": 0, "sample": [0, 1, 2], "label": [0, 0, 1], "prediction": [0, 0, 0]})
    >>> second = first.assign(prediction=[0, 1, 0])
    >>> mcnemar(first, second)
    Paired(only_first=1, only_second=0, p=1.0)
    """
    from statsmodels.stats.contingency_tables import mcnemar as test  # takes a second to import

    one, other = (_hits_by_sample(table) for table in (first, second))
    if not one.index.equals(other.index):
        raise ValueError(
            f"The two models have classified {len(one)} and {len(other)} images that are not the same: "
            "compare cells that are evaluated on the same test images."
        )
    counts = [[int((a & b).sum()) for b in (other, ~other)] for a in (one, ~one)]
    discordant = counts[0][1] + counts[1][0]
    p = test(counts, exact=discordant < 25, correction=True).pvalue if discordant else 1.0
    return Paired(counts[0][1], counts[1][0], float(p))


def _hits_by_sample(table: pd.DataFrame) -> pd.Series:
    """Return whether each image of the last evaluation was classified right, by its sample."""
    last = table[table["after"] == table["after"].max()]
    return (last["prediction"] == last["label"]).set_axis(last["sample"]).sort_index()
