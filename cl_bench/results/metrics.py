"""Functions of the accuracy matrix; nothing here needs more than NumPy.

``R[i, j]`` is the accuracy, in percent, on the test images of experience ``j`` after training on experience
``i``, both from 0, with the prediction chosen among all classes seen by then. ``R`` is (T, T) and NaN where
nothing was evaluated: in a class-incremental stream, everywhere above the diagonal. Other streams may have
zero-shot accuracies there, and each definition states whether it uses them. Every function raises a
ValueError for an array that is not square.

Codebases differ in their definition of forgetting, so every key of `summary` names its definition. Accuracies
have two weightings: *sample* counts every test image once, *experience* counts every experience once. They
agree when all experiences have the same number of test images.

A quantity is NaN when an evaluation that it needs is missing. A run in progress has no final accuracy; a
joint run, which fills only the last row, has accuracies but no forgetting and no average over the stream.

The forward transfer of GEM, https://arxiv.org/abs/1706.08840, is deliberately missing. It compares
``R[j - 1, j]`` with an untrained reference ``b[j]``, but a class-incremental classifier has no output for the
classes of ``j`` before it meets them: ``R[j - 1, j]`` is 0 by construction, every strategy would reach minus
the mean of ``b``, and a column of equal numbers would look like a finding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Vector = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

DEFINITIONS: dict[str, str] = {
    "acc/sample": "final accuracy over all images evaluated",
    "acc/experience": "mean over j of R[T-1, j], each experience counted once",
    "maa/sample": "mean over i of the accuracy over all images evaluated of experiences 0 to i",
    "maa/experience": "mean over i of the mean of R[i, j] over j ≤ i",
    "bwt/gem": "mean over j < T-1 of R[T-1, j] - R[j, j]",
    "bwt/continuum": "mean over all pairs j < i of R[i, j] - R[j, j]",
    "bwt/libcontinual": "sum over pairs j < i-1 of R[i, j] - R[j, j], divided by T(T-1)/2",
    "forgetting/chaudhry": "mean over j < T-1 of max R[i, j] over j ≤ i < T-1, minus R[T-1, j]",
    "forgetting/pilot": "mean over j < T-1 of max R[i, j] over j ≤ i ≤ T-1, minus R[T-1, j]; never negative",
    "forgetting/mammoth": "as forgetting/pilot, but the max includes the zero-shot R[j-1, j] if evaluated",
    "forgetting/renate": "as forgetting/chaudhry, but the max includes each zero-shot R[i, j] evaluated",
    "forgetting/avalanche": "mean over j < T-1 of R[j, j] - R[T-1, j], which is minus bwt/gem",
    "forgetting/libcontinual": "sum over j < T-2 of R[j, j] - R[T-1, j], divided by T-1",
    "plasticity/experience": "mean over j of R[j, j], the accuracy right after training on it",
    "within/sample": "final accuracy over all images evaluated, choosing within the true experience",
    "task_id/sample": "final share of all images evaluated whose predicted class lies in the true experience",
}
"""The definition of each key of `summary`; all values are percentages or differences of percentages.

The images evaluated are the test images, or in a validation run the training images that were held out.
"""

HIGHER_IS_BETTER: dict[str, bool] = {key: not key.startswith("forgetting/") for key in DEFINITIONS}
"""Whether a larger value of the key is better."""

BOUNDS: dict[str, tuple[float, float]] = {
    key: (-100.0, 100.0)
    if key.startswith(("bwt/", "forgetting/")) and key not in ("forgetting/pilot", "forgetting/mammoth")
    else (0.0, 100.0)
    for key in DEFINITIONS
}
"""The least and the greatest possible value of the key."""


def summary(correct: Matrix, total: Vector, *, within: Matrix, experience: Matrix) -> dict[str, float]:
    """Return every metric of `DEFINITIONS` for counts (T, T) of a stream with ``total`` (T,) test images.

    Args:
        correct: Images whose predicted class, among all classes seen, is right; NaN where not evaluated.
        total: Test images of each experience.
        within: Images predicted right when the choice is restricted to the classes of their experience.
        experience: Images whose predicted class, right or wrong, belongs to their experience.

    Returns:
        Percent by key, in the order of `DEFINITIONS`; NaN where undefined.

    Raises:
        ValueError: If the counts do not match ``total``.

    >>> values = summary(
    ...     np.array([[9.0, np.nan], [5.0, 24.0]]),
    ...     np.array([10.0, 30.0]),
    ...     within=np.array([[9.0, np.nan], [8.0, 27.0]]),
    ...     experience=np.array([[10.0, np.nan], [6.0, 26.0]]),
    ... )
    >>> values["acc/sample"], values["acc/experience"], values["bwt/gem"]
    (72.5, 65.0, -40.0)
    """
    R = accuracy_matrix(correct, total)
    by_sample = incremental_accuracy(correct, total)
    by_experience = incremental_experience_accuracy(R)
    values = {
        "acc/sample": by_sample[-1],
        "acc/experience": by_experience[-1],
        "maa/sample": by_sample.mean(),
        "maa/experience": by_experience.mean(),
        "within/sample": incremental_accuracy(within, total)[-1],
        "task_id/sample": incremental_accuracy(experience, total)[-1],
    } | {key: function(R) for key, function in _FUNCTIONS_OF_THE_MATRIX.items()}
    return {key: float(values[key]) for key in DEFINITIONS}


def accuracy_matrix(correct: Matrix, total: Vector) -> Matrix:
    """Return ``R`` (T, T) in percent from counts ``correct`` (T, T) of ``total`` (T,) test images.

    ``R[i, j] = 100 correct[i, j] / total[j]``, and NaN stays NaN.

    Raises:
        ValueError: If the shapes differ, an experience has no test images, or a count exceeds its total.

    >>> accuracy_matrix(np.array([[9.0, np.nan], [5.0, 24.0]]), np.array([10.0, 30.0]))
    array([[90., nan],
           [50., 80.]])
    """
    _refuse_misfit(correct, total)
    return 100.0 * correct / total


def incremental_accuracy(correct: Matrix, total: Vector) -> Vector:
    """Return the curve (T,) of accuracies over all test images of the experiences seen, in percent.

    ``a[i] = 100 Σ_{j ≤ i} correct[i, j] / Σ_{j ≤ i} total[j]``. The last entry is the final accuracy
    ``acc/sample``, the mean over ``i`` the average incremental accuracy ``maa/sample``.

    Source: iCaRL, https://arxiv.org/abs/1611.07725.

    Raises:
        ValueError: If the counts do not match ``total``.

    >>> incremental_accuracy(np.array([[9.0, np.nan], [5.0, 24.0]]), np.array([10.0, 30.0]))
    array([90. , 72.5])
    """
    _refuse_misfit(correct, total)
    return 100.0 * _sums_over_seen(correct) / np.cumsum(total)


def incremental_experience_accuracy(R: Matrix) -> Vector:
    """Return the curve (T,) of mean accuracies over the experiences seen, from ``R`` (T, T), in percent.

    ``ā[i] = 1/(i + 1) Σ_{j ≤ i} R[i, j]``. The last entry is ``acc/experience``, the mean over ``i``
    ``maa/experience``.

    Source: GEM, https://arxiv.org/abs/1706.08840, for the last entry.

    >>> incremental_experience_accuracy(np.array([[90.0, np.nan], [50.0, 80.0]]))
    array([90., 65.])
    """
    return _sums_over_seen(R) / np.arange(1, _length(R) + 1)


def plasticity(R: Matrix) -> float:
    """Return the mean accuracy on each experience of ``R`` (T, T) right after training on it, in percent.

    ``1/T Σ_j R[j, j]``, also called learning accuracy.

    Source: MER, https://arxiv.org/abs/1810.11910.

    >>> plasticity(np.array([[80.0, np.nan, np.nan], [90.0, 70.0, np.nan], [60.0, 75.0, 90.0]]))
    80.0
    """
    _length(R)
    return _mean(np.diagonal(R))


def backward_transfer_gem(R: Matrix) -> float:
    """Return the change of ``R`` (T, T) from learning an experience to the end, in points of percent.

    ``1/(T - 1) Σ_{j < T-1} (R[T-1, j] - R[j, j])``; NaN if T = 1.

    Source: GEM, https://arxiv.org/abs/1706.08840.

    >>> backward_transfer_gem(np.array([[80.0, np.nan, np.nan], [90.0, 70.0, np.nan], [60.0, 75.0, 90.0]]))
    -7.5
    """
    _length(R)
    return _mean((R[-1] - np.diagonal(R))[:-1])


def backward_transfer_continuum(R: Matrix) -> float:
    """Return the mean change since learning over all later rows of ``R`` (T, T), in points of percent.

    ``2/(T (T - 1)) Σ_{i ≥ 1} Σ_{j < i} (R[i, j] - R[j, j])``; NaN if T = 1.

    Source: Díaz-Rodríguez et al., https://arxiv.org/abs/1810.13166, the definition that Continuum cites. Its
    release 1.2.7 omits the pairs ``j = i - 1`` and therefore prints `backward_transfer_libcontinual`.

    >>> R = np.array([[80.0, np.nan, np.nan], [90.0, 70.0, np.nan], [60.0, 75.0, 90.0]])
    >>> round(backward_transfer_continuum(R), 2)
    -1.67
    """
    length = _length(R)
    return _mean(_changes(R)[np.tril_indices(length, k=-1)])


def backward_transfer_libcontinual(R: Matrix) -> float:
    """Return the change since learning over rows of ``R`` (T, T) two or more later, in points of percent.

    ``2/(T (T - 1)) Σ_{i ≥ 2} Σ_{j < i-1} (R[i, j] - R[j, j])``: the pairs ``j = i - 1`` are missing from the
    sum but counted in the divisor. NaN if T < 3, when no pair remains and LibContinual prints 0.

    Source: https://github.com/RL-VIG/LibContinual, ``core/utils/utils.py``.

    >>> R = np.array([[80.0, np.nan, np.nan], [90.0, 70.0, np.nan], [60.0, 75.0, 90.0]])
    >>> round(backward_transfer_libcontinual(R), 2)
    -6.67
    """
    length = _length(R)
    if length < 3:
        return np.nan
    return float(_changes(R)[np.tril_indices(length, k=-2)].sum() / (length * (length - 1) / 2))


def forgetting_chaudhry(R: Matrix) -> float:
    """Return the drop of ``R`` (T, T) from the best row before the last one, in points of percent.

    ``1/(T - 1) Σ_{j < T-1} (max_{j ≤ i < T-1} R[i, j] - R[T-1, j])``; NaN if T = 1. Negative if the last
    experience helps the others.

    Source: Riemannian Walk, equation 3, https://arxiv.org/abs/1801.10112.

    >>> forgetting_chaudhry(np.array([[80.0, np.nan, np.nan], [90.0, 70.0, np.nan], [60.0, 75.0, 90.0]]))
    12.5
    """
    row, column = _places(R)
    return _mean_drop(R, best_of=(column <= row) & (row < len(R) - 1))


def forgetting_pilot(R: Matrix) -> float:
    """Return the drop of ``R`` (T, T) from the best row, the last one included, in points of percent.

    ``1/(T - 1) Σ_{j < T-1} (max_{j ≤ i ≤ T-1} R[i, j] - R[T-1, j])``, never negative; NaN if T = 1.

    Source: https://github.com/LAMDA-CL/LAMDA-PILOT, ``trainer.py``.

    >>> forgetting_pilot(np.array([[80.0, np.nan, np.nan], [90.0, 70.0, np.nan], [60.0, 75.0, 90.0]]))
    15.0
    """
    row, column = _places(R)
    return _mean_drop(R, best_of=column <= row)


def forgetting_mammoth(R: Matrix) -> float:
    """Return `forgetting_pilot` of ``R`` (T, T) with the zero-shot accuracy just before learning in the max.

    ``1/(T - 1) Σ_{j < T-1} (max_{j-1 ≤ i ≤ T-1} R[i, j] - R[T-1, j])``; NaN if T = 1. Mammoth evaluates the
    next experience for its forward transfer, and the maximum includes it. If ``R[j - 1, j]`` is NaN, as in
    every class-incremental stream, this is `forgetting_pilot`.

    Source: https://github.com/aimagelab/mammoth, ``utils/metrics.py``.

    >>> forgetting_mammoth(np.array([[80.0, 76.0, np.nan], [90.0, 70.0, 20.0], [60.0, 75.0, 90.0]]))
    15.5
    """
    row, column = _places(R)
    return _mean_drop(R, best_of=column - 1 <= row)


def forgetting_renate(R: Matrix) -> float:
    """Return `forgetting_chaudhry` of ``R`` (T, T) with every zero-shot accuracy in the max.

    ``1/(T - 1) Σ_{j < T-1} (max_{i < T-1} R[i, j] - R[T-1, j])``; NaN if T = 1. If everything above the
    diagonal is NaN, as in every class-incremental stream, this is `forgetting_chaudhry`.

    Source: https://github.com/awslabs/Renate, ``src/renate/evaluation/metrics/classification.py``.

    >>> forgetting_renate(np.array([[80.0, 72.0, 10.0], [90.0, 70.0, 20.0], [60.0, 75.0, 90.0]]))
    13.5
    """
    row, _ = _places(R)
    return _mean_drop(R, best_of=row < len(R) - 1)


def forgetting_avalanche(R: Matrix) -> float:
    """Return the drop of ``R`` (T, T) since each experience was learned, in points of percent.

    ``1/(T - 1) Σ_{j < T-1} (R[j, j] - R[T-1, j])``, minus `backward_transfer_gem`; NaN if T = 1.

    Source: https://github.com/ContinualAI/avalanche, ``avalanche/evaluation/metrics/forgetting_bwt.py``.

    >>> forgetting_avalanche(np.array([[80.0, np.nan, np.nan], [90.0, 70.0, np.nan], [60.0, 75.0, 90.0]]))
    7.5
    """
    _length(R)
    return _mean((np.diagonal(R) - R[-1])[:-1])


def forgetting_libcontinual(R: Matrix) -> float:
    """Return the drop of ``R`` (T, T) since learning without the last two experiences, in points of percent.

    ``1/(T - 1) Σ_{j < T-2} (R[j, j] - R[T-1, j])``: the last experience but one is missing from the sum but
    counted in the divisor. NaN if T < 3, when no experience remains and LibContinual prints 0.

    Source: https://github.com/RL-VIG/LibContinual, ``core/utils/utils.py``.

    >>> forgetting_libcontinual(np.array([[80.0, np.nan, np.nan], [90.0, 70.0, np.nan], [60.0, 75.0, 90.0]]))
    10.0
    """
    length = _length(R)
    if length < 3:
        return np.nan
    return float((np.diagonal(R) - R[-1])[:-2].sum() / (length - 1))


def mtil_transfer(R: Matrix) -> float:
    """Return the mean zero-shot accuracy of ``R`` (T, T) on later experiences, in percent.

    ``1/(T - 1) Σ_{j ≥ 1} 1/j Σ_{i < j} R[i, j]``; NaN if T = 1, and in every class-incremental stream.

    Source: ZSCL, https://arxiv.org/abs/2303.06628.

    >>> mtil_transfer(np.array([[80.0, 60.0, 30.0], [70.0, 90.0, 50.0], [60.0, 80.0, 70.0]]))
    50.0
    """
    return _mean(np.array([R[:j, j].mean() for j in range(1, _length(R))]))


def mtil_average(R: Matrix) -> float:
    """Return the mean of all of ``R`` (T, T), zero-shot accuracies included, in percent.

    ``1/T Σ_j 1/T Σ_i R[i, j]``; NaN in every class-incremental stream longer than one experience.

    Source: ZSCL, https://arxiv.org/abs/2303.06628.

    >>> round(mtil_average(np.array([[80.0, 60.0, 30.0], [70.0, 90.0, 50.0], [60.0, 80.0, 70.0]])), 2)
    65.56
    """
    _length(R)
    return _mean(R)


def mtil_last(R: Matrix) -> float:
    """Return the mean of the last row of ``R`` (T, T), in percent.

    ``1/T Σ_j R[T-1, j]``, the same number as ``acc/experience``.

    Source: ZSCL, https://arxiv.org/abs/2303.06628.

    >>> mtil_last(np.array([[80.0, 60.0, 30.0], [70.0, 90.0, 50.0], [60.0, 80.0, 70.0]]))
    70.0
    """
    _length(R)
    return _mean(R[-1])


_FUNCTIONS_OF_THE_MATRIX: dict[str, Callable[[Matrix], float]] = {
    "bwt/gem": backward_transfer_gem,
    "bwt/continuum": backward_transfer_continuum,
    "bwt/libcontinual": backward_transfer_libcontinual,
    "forgetting/chaudhry": forgetting_chaudhry,
    "forgetting/pilot": forgetting_pilot,
    "forgetting/mammoth": forgetting_mammoth,
    "forgetting/renate": forgetting_renate,
    "forgetting/avalanche": forgetting_avalanche,
    "forgetting/libcontinual": forgetting_libcontinual,
    "plasticity/experience": plasticity,
}


def _length(R: Matrix) -> int:
    """Return T, or raise a ValueError if ``R`` does not have the shape of an accuracy matrix."""
    if R.ndim != 2 or R.shape[0] != R.shape[1] or R.size == 0:
        raise ValueError(
            f"An array of shape {R.shape} is not an accuracy matrix: "
            "give one row and one column for each experience."
        )
    return len(R)


def _places(R: Matrix) -> npt.NDArray[np.int_]:
    """Return the row and the column of every entry of ``R``, (2, T, T)."""
    return _indices(_length(R))


@lru_cache(maxsize=8)
def _indices(length: int) -> npt.NDArray[np.int_]:
    indices = np.indices((length, length))
    indices.flags.writeable = False
    return indices


@lru_cache(maxsize=8)
def _seen(length: int) -> Mask:
    mask = np.tri(length, dtype=bool)
    mask.flags.writeable = False
    return mask


def _refuse_misfit(correct: Matrix, total: Vector) -> None:
    length = _length(correct)
    if total.shape != (length,):
        raise ValueError(
            f"Totals of shape {total.shape} do not match {length} experiences: "
            "give the number of test images of each."
        )
    if not (total > 0).all():
        raise ValueError(
            f"Experience {np.argmin(total > 0)} has no test images, so it has no accuracy: "
            "remove it from the stream, or give it test images."
        )
    misfit = (correct < 0) | (correct > total)
    if misfit.any():
        i, j = np.argwhere(misfit)[0]
        raise ValueError(
            f"{correct[i, j]:g} of {total[j]:g} test images cannot be right (row {i}, experience {j}): "
            "give counts, not percentages."
        )


def _sums_over_seen(table: Matrix) -> Vector:
    """Return the sum of each row up to the diagonal, (T,), whatever stands above it."""
    seen = _seen(_length(table))
    sums: Vector = np.where(seen, table, 0.0).sum(axis=1)
    return sums


def _changes(R: Matrix) -> Matrix:
    """Return ``R[i, j] - R[j, j]``, (T, T)."""
    return R - np.diagonal(R)


def _mean_drop(R: Matrix, best_of: Mask) -> float:
    """Return best accuracy in ``best_of`` minus final accuracy, the mean over all but the last experience."""
    row, column = _places(R)
    # A missing zero-shot accuracy is not a candidate. A missing accuracy on or below the diagonal makes the
    # best one unknown: the maximum is NaN.
    candidates = best_of & ~((row < column) & np.isnan(R))
    best = np.where(candidates, R, -np.inf).max(axis=0)
    return _mean((best - R[-1])[:-1])


def _mean(values: Matrix | Vector) -> float:
    return float(values.mean()) if values.size else np.nan
