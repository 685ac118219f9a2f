"""Medians and ratios of calls that alternate, so that whatever slows the machine slows them all.

A round makes every call once, in an order that changes from round to round. A ratio is taken within each
round, between calls that were seconds apart, and its median is over rounds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch.utils.benchmark import Measurement, TaskSpec, Timer, timer

Key = TypeVar("Key", bound=Hashable)

_LEVEL = 0.95
_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices that a device's rate is measured with
_SECONDS = 1.0  # for which it is measured


class Spread(NamedTuple):
    """A median with its interval.

    Attributes:
        median: Of all values.
        low: Lower end of the interval.
        high: Its upper end.
    """

    median: float
    low: float
    high: float


def alternating(
    calls: Mapping[Key, Callable[[], object]], rounds: int, batches: Mapping[Key, int] | None = None
) -> dict[Key, Measurement]:
    """Return what each of ``calls`` took in each round; one round before them warms up.

    Times are wall-clock seconds, with the accelerator's work in them.

    Args:
        calls: What to time, by name.
        rounds: How often.
        batches: Of the calls that see several batches, how many; their times are those of one.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds + 1):
        shuffle(order)
        for key in order:
            began = timer()
            calls[key]()
            seconds[key].append(timer() - began)
    threads = torch.get_num_threads()
    return {
        key: Measurement(
            (batches or {}).get(key, 1), found[1:], TaskSpec(stmt=str(key), setup="", num_threads=threads)
        )
        for key, found in seconds.items()
    }


def ratios(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Return the median ratio of two calls that alternated, round by round.

    >>> ratios([2.0, 2.2, 40.0], [1.0, 1.0, 20.0])
    Spread(median=2.0, low=2.0, high=2.2)
    """
    return spread([above / below for above, below in zip(over, under, strict=True)])


def spread(values: Sequence[float]) -> Spread:
    """Return the median of ``values`` and an interval that holds the true one in at least 95 % of all cases.

    The interval runs between two of the values, and assumes nothing about their distribution: the number of
    values below the true median is binomial. Fewer than six cannot be that certain, and give their range.

    >>> spread([1.0, 2.0, 3.0])
    Spread(median=2.0, low=1.0, high=3.0)
    >>> spread([float(value) for value in range(1, 10)])
    Spread(median=5.0, low=2.0, high=8.0)
    """
    ordered, number = sorted(values), len(values)
    left_out, tail = 0, 0.0
    while left_out < number // 2:
        tail += math.comb(number, left_out) / 2**number
        if 2 * tail > 1 - _LEVEL:
            break
        left_out += 1
    outermost = max(left_out - 1, 0)
    middle = (ordered[(number - 1) // 2] + ordered[number // 2]) / 2
    return Spread(middle, ordered[outermost], ordered[-1 - outermost])


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return how many floating-point operations a second a large product of matrices runs at, at its best."""
    side = _SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.rand(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    product = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * side**3 / min(product.blocked_autorange(min_run_time=_SECONDS).times)
