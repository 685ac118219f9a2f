from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import RidgeHead
from strategies.ranpac import RIDGES, RanPAC, best_ridge

Making = Callable[..., Backbone]
GENERATOR = torch.Generator().manual_seed(0)
FEATURES = torch.randn(40, 6, dtype=torch.float64, generator=GENERATOR) + 0.5
LABELS = torch.arange(40) % 4
ONE_HOT = torch.nn.functional.one_hot(LABELS, 4).double()


def solved(*groups: Tensor, ridge: float = 3.0, width: int | None = None) -> RidgeHead:
    """Return a head that was given the images ``groups``, one group after the other."""
    torch.manual_seed(1)
    head = RidgeHead(6, width)
    head.grow(4)
    head.double()
    for group in groups:
        head.add(FEATURES[group], LABELS[group])
    head.solve(ridge)
    return head


@pytest.mark.parametrize("ridge", (1e-3, 1.0, 1e3))
def test_the_weight_is_the_ridge_regression_of_scikit_learn(ridge: float) -> None:
    head = solved(torch.arange(40), ridge=ridge)
    expected = Ridge(alpha=ridge, fit_intercept=False, solver="cholesky").fit(
        FEATURES.numpy(), ONE_HOT.numpy()
    )
    np.testing.assert_allclose(head.weight.numpy(), expected.coef_, rtol=0, atol=1e-10)


def test_random_features_are_the_inputs_of_the_same_regression() -> None:
    head = solved(torch.arange(40), width=11)
    assert head.projection is not None
    hidden = np.maximum(FEATURES.numpy() @ head.projection.numpy(), 0)
    expected = Ridge(alpha=3.0, fit_intercept=False, solver="cholesky").fit(hidden, ONE_HOT.numpy())
    np.testing.assert_allclose(head(FEATURES).numpy(), expected.predict(hidden), rtol=0, atol=1e-10)


def test_the_solution_does_not_depend_on_how_images_arrive() -> None:
    joint, parts = solved(torch.arange(40), width=9), torch.arange(40).split(13)
    for order in (parts, parts[::-1]):
        torch.testing.assert_close(solved(*order, width=9).weight, joint.weight, rtol=0, atol=1e-10)
    values = torch.linalg.eigvalsh(joint.gram)
    assert torch.equal(joint.gram, joint.gram.T) and values.min() > -1e-9


@pytest.mark.parametrize("width", (3, 200))
def test_the_chosen_ridge_is_the_best_of_scikit_learn_on_held_out_rows(width: int) -> None:
    hidden = (FEATURES @ torch.randn(6, width, dtype=torch.float64, generator=GENERATOR)).relu()
    errors = []
    for ridge in RIDGES[6:]:
        fitted = Ridge(alpha=ridge, fit_intercept=False, solver="svd").fit(hidden[:32], ONE_HOT[:32])
        errors.append(np.square(fitted.predict(hidden[32:]) - ONE_HOT[32:].numpy()).mean())
    assert best_ridge(hidden, ONE_HOT, RIDGES[6:]) == RIDGES[6:][int(np.argmin(errors))]


def test_one_image_is_enough_to_choose_a_ridge() -> None:
    assert best_ridge(FEATURES[:1], ONE_HOT[:1]) in RIDGES


def test_only_the_first_experience_trains_and_features_stay_afterwards(
    backbone: Making, walk: Callable[..., Any]
) -> None:
    strategy = RanPAC(backbone(), bottleneck=4, random_features=64)
    walked = walk(strategy)
    assert [cost.trainable_parameters for cost in walked.result.costs] == [
        2 * (32 * 8 + 4 + 32) + 2 * 32 + 1,
        0,
        0,
    ]
    assert len(walked.losses) == 2 * 3
    assert strategy.head.weight.shape == (6, 64)


def test_the_stream_ends_with_the_solution_of_all_images_at_once(
    backbone: Making, walk: Callable[..., Any]
) -> None:
    several, single = (RanPAC(backbone(), adaptation=False, random_features=50) for _ in range(2))
    walk(several)
    walk(single, num_experiences=1)
    assert several.head.gram.trace() > 0
    torch.testing.assert_close(several.head.gram, single.head.gram, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(several.head.sums, single.head.sums, rtol=1e-5, atol=1e-4)
