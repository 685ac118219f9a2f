from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cl_bench.maths.violation import null_space_violation, relative_violation, scale_free_violation

M, N, K = 24, 20, 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


UPDATE = normal(M, N)
BASIS = torch.linalg.qr(normal(N, K, seed=1)).Q
OUTSIDE = UPDATE - UPDATE @ BASIS @ BASIS.mT


def test_violation_by_the_second_moment_equals_the_change_of_the_outputs() -> None:
    inputs, updates = normal(50, N, seed=2), normal(3, M, N)
    found = null_space_violation(updates, inputs.T @ inputs / 50, num_tokens=50)
    torch.testing.assert_close(found, torch.linalg.matrix_norm(updates @ inputs.T), rtol=0, atol=1e-11)


def test_an_update_outside_all_inputs_has_no_violation() -> None:
    inputs = normal(50, K, seed=2) @ BASIS.T
    moment = inputs.T @ inputs / 50
    assert null_space_violation(OUTSIDE, moment, 50) < 1e-6  # half of the digits, because it is a root
    assert null_space_violation(UPDATE, moment, 50) > 10


def test_the_scale_free_violation_is_a_ratio_of_norms_that_no_scale_changes() -> None:
    inputs, norm = normal(50, N, seed=2), torch.linalg.matrix_norm
    expected = norm(UPDATE @ inputs.T) / (norm(UPDATE) * norm(inputs))
    for scale, number in ((1, 1), (100, 1), (1, 50)):
        found = scale_free_violation(scale * UPDATE, inputs.T @ inputs / number)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    along = UPDATE[:, :1] @ inputs[:1]  # acts on one direction, in which all inputs then lie
    assert scale_free_violation(along, inputs[:1].T @ inputs[:1]) == pytest.approx(1)
    assert scale_free_violation(torch.zeros(M, N), torch.eye(N)) == 0


def test_the_relative_violation_is_the_share_of_the_norm_inside_the_span() -> None:
    updates, bases = normal(2, 3, M, N), torch.linalg.qr(normal(2, 3, N, K, seed=1)).Q
    inside = updates @ bases @ bases.mT
    expected = torch.linalg.matrix_norm(inside) / torch.linalg.matrix_norm(updates)
    torch.testing.assert_close(relative_violation(updates, bases), expected, rtol=0, atol=1e-14)
    assert relative_violation(UPDATE - OUTSIDE, BASIS) == pytest.approx(1)
    assert relative_violation(OUTSIDE, BASIS) < 1e-14


def test_no_update_or_no_protected_direction_means_no_violation() -> None:
    assert relative_violation(torch.zeros(M, N), BASIS.float()) == 0
    assert relative_violation(UPDATE, BASIS[:, :0]) == 0
