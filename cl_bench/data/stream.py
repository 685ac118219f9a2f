"""Class orders, the sizes of experiences, and dealing a dataset into a stream.

A stream is built from Avalanche's own objects, which `avalanche.py` imports only when a stream is dealt.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
from torch import Tensor

from cl_bench.data.experience import Experience
from cl_bench.data.sources import Indices, Source
from cl_bench.errors import by_likeness
from cl_bench.results.result import digest

Transform = Callable[[Any], Tensor]
"""From a decoded image to a float tensor (3, H, W) in [0, 1]."""

_LARGEST_NUMPY_SEED = 2**32 - 1


def class_order(order: str | Sequence[int], num_classes: int) -> tuple[int, ...]:
    """Return the original label at each position.

    Args:
        order: ``identity``; ``numpy:SEED``, the permutation that most published code draws;
            ``python:SEED``, a shuffle by Python's own generator; or the labels themselves.
        num_classes: Number of classes of the dataset.

    Raises:
        ValueError: If the order is unknown, or does not list each label from 0 to ``num_classes - 1`` once.

    >>> class_order("numpy:1993", 100)[:8]
    (68, 56, 78, 8, 23, 84, 90, 65)
    >>> class_order([2, 0, 1], 3)
    (2, 0, 1)
    """
    if not isinstance(order, str):
        return _permutation(order, num_classes)
    generator, seed = _parts(order)
    if generator == "numpy":
        return tuple(np.random.RandomState(seed).permutation(num_classes).tolist())
    labels = list(range(num_classes))
    if generator == "python":
        random.Random(seed).shuffle(labels)
    return tuple(labels)


def order_name(order: str | Sequence[int]) -> str:
    """Return a short name of ``order``, fit for a path; a list is named by a hash of its labels.

    Raises:
        ValueError: If the order is unknown.

    >>> order_name("numpy:1993"), order_name([2, 0, 1])
    ('numpy-1993', 'list-a50c12ec')
    """
    if not isinstance(order, str):
        return f"list-{digest([int(label) for label in order])}"
    generator, seed = _parts(order)
    return generator if seed is None else f"{generator}-{seed}"


def _parts(order: str) -> tuple[str, int | None]:
    """Return the generator that ``order`` names and its seed, which is None for the identity."""
    if order == "identity":
        return order, None
    match = re.fullmatch(r"(numpy|python):(\d+)", order, flags=re.ASCII)
    if match is None:
        raise ValueError(
            f"The class order {order!r} is unknown: did you mean {_nearest_order(order)}? "
            "An order is identity, numpy:SEED, python:SEED or a list of labels."
        )
    generator, seed = match[1], int(match[2])
    if generator == "numpy" and seed > _LARGEST_NUMPY_SEED:
        raise ValueError(f"NumPy takes no seed above {_LARGEST_NUMPY_SEED}: choose a smaller one.")
    return generator, seed


def _nearest_order(order: str) -> str:
    word, digits = re.match(r"\D*", order)[0], re.search(r"\d+", order)  # type: ignore[index]
    name = by_likeness(word.lower() or "numpy", ["identity", "numpy", "python"])[0]
    return name if name == "identity" else f"{name}:{digits[0] if digits else 'SEED'}"


def _permutation(order: Sequence[int], num_classes: int) -> tuple[int, ...]:
    labels = tuple(int(label) for label in order)
    if sorted(labels) == list(range(num_classes)):
        return labels
    missing = sorted(set(range(num_classes)) - set(labels))
    wrong = sorted({label for label in labels if labels.count(label) > 1 or not 0 <= label < num_classes})
    faults = [f"lacks {_some(missing)}"] * bool(missing) + [f"cannot hold {_some(wrong)}"] * bool(wrong)
    raise ValueError(
        f"The class order {' and '.join(faults)}: list each label from 0 to {num_classes - 1} exactly once."
    )


def _some(labels: Sequence[int]) -> str:
    shown = ", ".join(str(label) for label in labels[:5])
    return shown if len(labels) <= 5 else f"{shown}, …"


def experience_sizes(
    num_classes: int,
    num_experiences: int | None = None,
    num_classes_per_experience: int | Sequence[int] | None = None,
) -> list[int]:
    """Return the number of classes that each experience brings, from one of the last two arguments.

    Args:
        num_classes: Number of classes of the dataset.
        num_experiences: Length of a stream of equal experiences.
        num_classes_per_experience: Size of equal experiences, or one size for each.

    Raises:
        ValueError: If a class would be left over, or an experience would bring none.

    >>> experience_sizes(345, num_experiences=5)
    [69, 69, 69, 69, 69]
    >>> experience_sizes(10, num_classes_per_experience=[6, 4])
    [6, 4]
    """
    require_one_division(num_experiences, num_classes_per_experience)
    if num_experiences is not None:
        number, parts = num_experiences, f"{num_experiences} experiences"
        return [_quotient(num_classes, number, parts, "{} experiences")] * number
    if isinstance(num_classes_per_experience, int):
        size, parts = num_classes_per_experience, f"experiences of {num_classes_per_experience}"
        return [size] * _quotient(num_classes, size, parts, "a size of {}")
    assert num_classes_per_experience is not None
    return _listed_sizes(num_classes, num_classes_per_experience)


def require_one_division(
    num_experiences: int | None, num_classes_per_experience: int | Sequence[int] | None
) -> None:
    """Check that the division is given, in exactly one of two ways.

    Raises:
        ValueError: If both arguments are None, or neither.
    """
    if num_experiences is None and num_classes_per_experience is None:
        raise ValueError(
            "The number or the size of the experiences is missing: give num_experiences or "
            "num_classes_per_experience."
        )
    if num_experiences is not None and num_classes_per_experience is not None:
        raise ValueError(
            f"Both num_experiences ({num_experiences}) and num_classes_per_experience "
            f"({num_classes_per_experience}) are given: set one of them to null."
        )


def _quotient(num_classes: int, divisor: int, parts: str, choice: str) -> int:
    """Return ``num_classes`` over ``divisor``; ``parts`` and ``choice`` are the words of an error."""
    if not 1 <= divisor <= num_classes:
        raise ValueError(
            f"{num_classes} classes cannot be dealt into {parts}: "
            f"choose {choice.format(f'1 to {num_classes}')}."
        )
    quotient, remainder = divmod(num_classes, divisor)
    if remainder:
        raise ValueError(
            f"{num_classes} classes cannot be dealt evenly into {parts}, {remainder} would remain: choose "
            f"{choice.format(_nearest_divisors(num_classes, divisor))}, "
            "or list the sizes in num_classes_per_experience."
        )
    return quotient


def _listed_sizes(num_classes: int, sizes: Sequence[int]) -> list[int]:
    if not sizes or min(sizes) < 1:
        raise ValueError(f"The sizes {list(sizes)} leave an experience empty: give each at least one class.")
    if sum(sizes) != num_classes:
        raise ValueError(
            f"The experiences of num_classes_per_experience hold {sum(sizes)} classes and the dataset has "
            f"{num_classes}: make them sum to {num_classes}."
        )
    return list(sizes)


def _nearest_divisors(number: int, near: int) -> str:
    divides = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    return f"{max(d for d in divides if d < near)} or {min(d for d in divides if d > near)}"


@dataclass(frozen=True, eq=False)
class Stream:
    """A dataset dealt into experiences.

    Attributes:
        experiences: The experiences, in the order of training.
        train_indices: Training images of each experience, in the order of Avalanche's experience datasets.
        test_indices: Test images of each experience, in the same order.
        order: Original label at each position.
        benchmark: Avalanche's ``NCScenario`` over the same images; its labels are positions as well.
    """

    experiences: tuple[Experience, ...]
    train_indices: tuple[Indices, ...]
    test_indices: tuple[Indices, ...]
    order: tuple[int, ...]
    benchmark: Any

    @property
    def num_classes(self) -> int:
        """Number of classes of all experiences."""
        return self.experiences[-1].classes.stop

    def first(self, number: int | None) -> Stream:
        """Return the first ``number`` experiences, which keep their place in the whole stream; None for all.

        Raises:
            ValueError: If there are not that many.
        """
        if number is not None and not 1 <= number <= len(self.experiences):
            raise ValueError(
                f"first_experiences is {number} of {len(self.experiences)} experiences: choose 1 to "
                f"{len(self.experiences)}."
            )
        return replace(
            self,
            experiences=self.experiences[:number],
            train_indices=self.train_indices[:number],
            test_indices=self.test_indices[:number],
        )


def deal(
    train: Source,
    test: Source,
    order: Sequence[int],
    sizes: Sequence[int],
    *,
    class_names: Sequence[str] = (),
    train_transform: Transform | None = None,
    test_transform: Transform | None = None,
) -> Stream:
    """Deal the classes, in ``order``, into experiences of the given ``sizes``.

    Args:
        train: Training images; every class has at least one.
        test: Test images; every class has at least one.
        order: Original label at each position.
        sizes: Number of classes of each experience; they sum to the number of classes.
        class_names: Name of each original label; empty if the classes have none.
        train_transform: What Avalanche's training experiences apply to an image; nothing if None.
        test_transform: What Avalanche's test experiences apply to an image; nothing if None.

    Raises:
        ValueError: If a class has no image, or an image has a label outside the order.
    """
    for name, source in (("training", train), ("test", test)):
        _require_all_classes(name, source, len(order))
    from cl_bench.data.avalanche import nc_benchmark

    benchmark = nc_benchmark(
        train,
        test,
        len(sizes),
        task_labels=False,
        shuffle=False,
        fixed_class_order=list(order),
        per_exp_classes=dict(enumerate(sizes)),
        class_ids_from_zero_from_first_exp=True,
        train_transform=train_transform,
        eval_transform=test_transform,
    )
    names = [class_names[label] for label in order] if class_names else ()
    return Stream(
        experiences=tuple(
            Experience(index, len(sizes), range(stop - size, stop), tuple(names[stop - size : stop]))
            for index, (size, stop) in enumerate(zip(sizes, accumulate(sizes), strict=True))
        ),
        train_indices=_arrays(benchmark.train_exps_patterns_assignment),
        test_indices=_arrays(benchmark.test_exps_patterns_assignment),
        order=tuple(order),
        benchmark=benchmark,
    )


def _arrays(assignment: Sequence[Sequence[int]]) -> tuple[Indices, ...]:
    return tuple(np.asarray(indices, dtype=np.int64) for indices in assignment)


def _require_all_classes(name: str, source: Source, num_classes: int) -> None:
    labels = set(np.unique(np.asarray(source.targets, dtype=np.int64)).tolist())
    missing, foreign = sorted(set(range(num_classes)) - labels), sorted(labels - set(range(num_classes)))
    if foreign:
        raise ValueError(
            f"The {name} images have labels {_some(foreign)}, outside 0 to {num_classes - 1}: "
            "number the classes from 0 without gaps."
        )
    if missing:
        raise ValueError(
            f"The {name} images lack the classes {_some(missing)}: give every class at least one training "
            "image and one test image."
        )
