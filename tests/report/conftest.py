"""Small results made by hand, from which every number in a report can be worked out in the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from cl_bench.results import Cost, Protocol, Regime, Result, Row, Status

Made = Callable[..., Result]

TEST_IMAGES = 10

IDENTITY = {
    "image_size": 32,
    "backbone": {"model": "vision_transformer", "options": {"depth": 2}, "weights": "random"},
}
PROVENANCE = {"versions": {"torch": "2.15.0"}, "device": "cpu (x86_64)", "threads": 1}


@pytest.fixture
def made() -> Made:
    """A function that makes a result of one class an experience, ten test images each, from its counts."""
    return _result


def _result(
    strategy: str = "LoRA (merge)",
    counts: Sequence[Sequence[int] | None] = ((9,), (5, 8)),
    *,
    seed: int = 1,
    order: str = "identity",
    dataset: str = "digits",
    regime: Regime = "sequential",
    status: Status = "done",
    error: str | None = None,
    setting: str | None = None,
    config: dict[str, Any] | None = None,
    identity: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    length: int | None = None,
) -> Result:
    length = len(counts) if length is None else length
    return Result(
        strategy=strategy,
        dataset=dataset,
        experiences=[(i, i + 1) for i in range(length)],
        class_names=[f"class {i}" for i in range(length)],
        test_images=[TEST_IMAGES] * length,
        order=order,
        seed=seed,
        regime=regime,
        protocol=Protocol(IDENTITY | (identity or {}), {"seed": seed, "order": order}, {"dataset": dataset}),
        config={
            "strategy": strategy,
            "dataset": f"{dataset}-T{length}",
            "regime": regime,
            "seed": seed,
            "order": order,
        }
        | (config or {}),
        setting=setting,
        status=status,
        error=error,
        rows=[None if row is None else Row(list(row), list(row), list(row)) for row in counts],
        costs=[
            Cost({"training": 2.0, "evaluation": 0.5}, 100 + i, 1_500_000, 10**9) for i in range(len(counts))
        ],
        provenance=PROVENANCE | (provenance or {}),
    )
