"""Small results from which every number of a report can be computed by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from cl_bench.results.result import Cost, Protocol, Regime, Result, Row, Status

Made = Callable[..., Result]

TEST_IMAGES = 10

IDENTITY = {
    "image_size": 32,
    "backbone": {"model": "vision_transformer", "options": {"depth": 2}, "weights": "random"},
}
PROVENANCE = {"versions": {"torch": "2.15.0"}, "device": "cpu (x86_64)", "threads": 1}


@pytest.fixture
def made() -> Made:
    """Function from counts to a result, with one class per experience and ten test images per class."""
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


DOMAINS = ["clipart", "painting", "real", "sketch"]


@pytest.fixture(scope="session")
def drawn() -> Callable[..., Result]:
    """Function that draws a random result of a longer stream for a strategy of given strengths."""
    return _drawn


def _drawn(
    strategy: str,
    seed: int,
    order: str = "identity",
    *,
    found: float = 0.9,
    within: float = 0.9,
    lost: float = 0.02,
    length: int = 10,
    classes: int = 2,
    images: int = 48,
    dataset: str = "imagenet_r",
    domains: bool = False,
    diagnostics: bool = False,
    regime: Regime = "sequential",
    identity: dict[str, Any] | None = None,
    seconds: float = 30.0,
) -> Result:
    """Return a result with random counts.

    An experience is found with probability ``found`` minus ``lost`` for each later one, and the class within
    it with probability ``within``. A block shifts all strategies equally, so that pairing by blocks matters.
    """
    block = np.random.default_rng([seed, *order.encode()])
    shift = block.normal(0.0, 0.02)
    rng = np.random.default_rng([seed, *order.encode(), *strategy.encode()])
    rows: list[Row | None] = []
    for i in range(length):
        age = np.repeat(np.arange(i, -1, -1), classes)
        p_found = np.clip(found + shift - lost * age - 0.004 * i, 0.02, 0.99)
        seen = rng.binomial(images, p_found)
        right = rng.binomial(seen, np.clip(within + shift, 0.02, 0.99))
        masked = right + rng.binomial(images - seen, np.clip(within - 0.1, 0.02, 0.99))
        each = [images // len(DOMAINS)] * len(DOMAINS)
        parts = [rng.multivariate_hypergeometric(each, int(number)) for number in right] if domains else []
        rows.append(Row(right.tolist(), masked.tolist(), seen.tolist(), np.array(parts).T.tolist()))
    if regime == "joint":
        rows = [*[None] * (length - 1), rows[-1]]
    made = _result(strategy, length=length, seed=seed, order=order, dataset=dataset, regime=regime)
    made.experiences = [(i * classes, (i + 1) * classes) for i in range(length)]
    made.class_names = [f"class {i}" for i in range(length * classes)]
    made.test_images = [images] * (length * classes)
    made.protocol.identity |= identity or {}
    made.rows = rows
    made.costs = [
        Cost(
            {"data_passes": 0.2 * seconds, "training": seconds, "evaluation": 0.1 * seconds},
            int(1e5 * within),
            int(1e6 * (1 + i * lost)),
            int(2e9 * found),
        )
        for i in range(length)
    ]
    made.provenance = PROVENANCE | {"commit": "0123456789ab", "started": "2026-11-25T12:00:00+00:00"}
    if domains:
        made.domains = DOMAINS
        made.domain_images = [[images // len(DOMAINS)] * (length * classes) for _ in DOMAINS]
    if diagnostics:
        made.diagnostics = [_diagnostics(i, lost, rng) for i in range(length)]
    return made


def _diagnostics(index: int, lost: float, rng: np.random.Generator) -> dict[str, Any]:
    depth = np.arange(6)
    layers = [
        {"absolute": float(10 * lost * (1 + layer)), "relative": float(lost * (1 + layer))} for layer in depth
    ]
    return {
        "basis_dims": (20 + 6 * index + 2 * depth).tolist(),
        "violation": {"k": layers, "v": layers} if index else {},
        "danger_score": 0.2 + lost if index else None,
        "angular": {
            "nearest_old": rng.normal(0.2 + 4 * lost, 0.12, 64).clip(-1, 1).tolist(),
            "own_centre": rng.normal(0.65, 0.1, 64).clip(-1, 1).tolist(),
        }
        if index
        else None,
        "held_out_ncm": {"before": 0.6, "after": 0.6 - lost},
    }
