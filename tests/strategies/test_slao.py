from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from cl_bench.contracts.strategy import TrainingData, state_bytes
from cl_bench.network.backbones import Backbone
from strategies.lora import LoRA
from strategies.slao import SLAO

Walking = Callable[..., Any]
Making = Callable[..., Backbone]
Pair = tuple[Tensor, Tensor]


class Watched(SLAO):
    """Notes the trained pair before and after its rows are made orthonormal, and after training."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.left: list[list[Pair]] = []
        self.starts: list[list[Pair]] = []
        self.ends: list[list[Pair]] = []
        self.merged: list[list[Pair]] = []

    def before_training(self, data: TrainingData) -> None:
        self.left.append(self._trained())
        super().before_training(data)
        self.starts.append(self._trained())

    def after_training(self, data: TrainingData) -> None:
        self.ends.append(self._trained())
        super().after_training(data)
        pairs = [layer.merged(name) for layer in self.layers for name in layer.rows]
        self.merged.append([(down.clone(), up.clone()) for down, up in pairs])

    def _trained(self) -> list[Pair]:
        return [(one.A.detach().clone(), one.B.detach().clone()) for _, one in self.adapters()]


def walked(backbone: Making, walk: Walking, **settings: Any) -> Watched:
    strategy = Watched(
        backbone(), rank=4, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01), **settings
    )
    walk(strategy, num_experiences=6, num_classes=12, max_epochs=1)
    return strategy


def test_new_rows_are_an_orthonormal_basis_of_the_old_ones(backbone: Making, walk: Walking) -> None:
    strategy = walked(backbone, walk)
    for left, start in zip(strategy.left[1:], strategy.starts[1:], strict=True):
        for (A, B), (A0, B0) in zip(left, start, strict=True):
            torch.testing.assert_close(A0 @ A0.mT, torch.eye(4), atol=1e-6, rtol=0)
            old = scipy.linalg.orth(A.double().numpy().T)
            np.testing.assert_allclose(A0.numpy().T @ A0.numpy(), old @ old.T, atol=1e-6)
            assert torch.equal(B, B0)
            assert (np.diag(A.numpy() @ A0.numpy().T) > 0).all()  # the signs of diag R


def test_every_experience_trains_on_from_the_last(backbone: Making, walk: Walking) -> None:
    strategy = walked(backbone, walk)
    for end, left in zip(strategy.ends, strategy.left[1:], strict=False):
        for one, other in zip(end, left, strict=True):
            assert all(map(torch.equal, one, other))


def test_after_one_experience_merged_and_trained_pair_have_the_same_bits(
    backbone: Making, walk: Walking
) -> None:
    strategy = walked(backbone, walk)
    for merged, end in zip(strategy.merged[0], strategy.ends[0], strict=True):
        assert all(map(torch.equal, merged, end))


def test_the_merged_pair_is_the_closed_form_of_the_average(backbone: Making, walk: Walking) -> None:
    """B_m after i experiences is the sum of B_j λ_j Π_{j<l≤i} (1 - λ_l), with λ_l = 1/√l."""
    strategy = walked(backbone, walk)
    rates = [1 / number**0.5 for number in range(1, 7)]
    for count, merged in enumerate(strategy.merged, 1):
        shares = [
            rates[j] * np.prod([1 - rates[later] for later in range(j + 1, count)]) for j in range(count)
        ]
        assert sum(shares) == pytest.approx(1)
        for projection, (down, up) in enumerate(merged):
            expected = sum(
                float(share) * strategy.ends[j][projection][1].double() for j, share in enumerate(shares)
            )
            torch.testing.assert_close(up.double(), expected, atol=1e-6, rtol=1e-5)
            assert torch.equal(down, strategy.ends[count - 1][projection][0])


def test_images_are_classified_with_the_merged_pair(backbone: Making, walk: Walking) -> None:
    strategy = walked(backbone, walk)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for training, pairs in ((False, strategy.merged[-1]), (True, strategy.ends[-1])):
        lora = LoRA(backbone(), rank=4)
        with torch.no_grad():
            for (_, adapter), (down, up) in zip(lora.adapters(), pairs, strict=True):
                adapter.A.copy_(down)
                adapter.B.copy_(up)
        strategy.train(training)
        before = {name: value.clone() for name, value in strategy.named_parameters()}
        torch.testing.assert_close(strategy.features(images), lora.features(images), atol=1e-5, rtol=1e-5)
        for ours, other in zip(strategy.layers, lora.layers, strict=True):
            torch.testing.assert_close(ours.effective_weight(), other.effective_weight())
        assert all(torch.equal(before[name], value) for name, value in strategy.named_parameters())


@pytest.mark.parametrize("keep", (False, True))
def test_the_start_changes_the_trained_product_unless_it_is_kept(
    backbone: Making, walk: Walking, keep: bool
) -> None:
    strategy = walked(backbone, walk, keep_function=keep)
    changes = [
        [float((B0 @ A0 - B @ A).norm() / (B @ A).norm()) for (A, B), (A0, B0) in zip(*both, strict=True)]
        for both in zip(strategy.left[1:], strategy.starts[1:], strict=True)
    ]
    if keep:
        assert max(map(max, changes)) < 1e-5
    else:  # later, the rows are nearly orthonormal already
        assert min(changes[0]) > 0.1


def test_a_layer_with_two_functions_is_not_merged(backbone: Making) -> None:
    layer = SLAO(backbone(), rank=4).layers[0]
    with torch.no_grad():
        layer.adapter(next(iter(layer.rows))).B.fill_(1.0)
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match="one of the two"):
        layer.merge()
    assert torch.equal(layer.weight, before)
    assert not torch.equal(layer.train().effective_weight(), layer.eval().effective_weight())


def test_what_is_kept_does_not_grow(backbone: Making, walk: Walking) -> None:
    class Weighed(SLAO):
        def after_training(self, data: TrainingData) -> None:
            super().after_training(data)
            kept.append(self.stored_bytes - state_bytes(self.get_submodule("head")))

    kept: list[int] = []
    walk(Weighed(backbone(), rank=2))
    assert len(kept) == 3 and len(set(kept)) == 1
