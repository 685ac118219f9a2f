from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cl_bench.losses import local_cross_entropy


def test_local_cross_entropy_is_the_full_one_with_older_logits_at_minus_infinity() -> None:
    generator = torch.Generator().manual_seed(0)
    older = torch.randn(6, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    current = torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([7, 9, 8, 8, 7, 9])
    full = F.cross_entropy(
        torch.cat([older.masked_fill(torch.ones_like(older) > 0, -math.inf), current], 1), labels
    )
    local = local_cross_entropy(current, labels, first_class=7)
    torch.testing.assert_close(local, full, rtol=0, atol=1e-15)
    gradients = torch.autograd.grad(full, (older, current))
    assert not gradients[0].any()
    torch.testing.assert_close(torch.autograd.grad(local, current)[0], gradients[1], rtol=0, atol=1e-15)


@pytest.mark.parametrize("label", [0, 99, 102])
def test_a_label_of_another_experience_is_never_passed_over(label: int) -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        local_cross_entropy(torch.zeros(2, 2), torch.tensor([100, label]), first_class=100)
