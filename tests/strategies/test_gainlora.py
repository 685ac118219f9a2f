from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.contracts.strategy import TrainingData
from cl_bench.data.experience import Experience
from cl_bench.maths.memory import GPM, below_first
from cl_bench.maths.subspace import energy_threshold
from cl_bench.network.backbones import Backbone
from strategies.gainlora import GainLoRA, Gate, narrowed
from strategies.inflora import InfLoRA

Making = Callable[..., Backbone]
Walking = Callable[..., Any]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def stages(gate: Gate, summary: Tensor) -> dict[str, Tensor]:
    """The inputs (B, …) of each part of a gate."""
    inner = F.silu(summary @ gate.inner.weight.T)
    return {"inner": summary, "outer": inner, "key": F.silu(inner @ gate.outer.weight.T)}


class Watched(GainLoRA):
    """Notes what the gates held around every experience, and what they were given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.inputs: list[dict[str, Tensor]] = []
        self.free: list[dict[str, Tensor]] = []
        self.keys: list[Tensor] = []
        self.kept: list[dict[str, Tensor]] = []

    def before_training(self, data: TrainingData) -> None:
        self.inputs.append(self._inputs(data))
        super().before_training(data)
        self.free.append(
            {name: self.get_buffer(f"free_{name}").clone() for name in ("inner", "outer", "key")}
        )
        self.keys.append(self._gate(-1).key.weight.detach().clone())

    def after_training(self, data: TrainingData) -> None:
        self.inputs.append(self._inputs(data))
        super().after_training(data)
        kept = {
            name: value for name, value in self.named_parameters() if "adapters" in name or "gates" in name
        }
        self.kept.append({name: value.detach().clone() for name, value in kept.items()})

    def _inputs(self, data: TrainingData) -> dict[str, Tensor]:
        return stages(self._gate(-1), torch.cat([self.summary(images) for images, _ in data.augmented()]))


@pytest.fixture
def watched(backbone: Making, walk: Walking) -> Watched:
    strategy = Watched(backbone(), rank=4, gate_width=16, gate_threshold=0.9, optimizer=adam)
    walk(strategy)
    return strategy


@torch.no_grad()
def test_a_gate_is_the_sigmoid_of_four_cosines_and_at_most_0_964() -> None:
    torch.manual_seed(0)
    gate, summary = Gate(dim=8, width=5), torch.randn(20, 8)
    found = stages(gate, summary)["key"]
    expected = (2 * torch.sigmoid(4 * F.cosine_similarity(found, gate.key.weight)) - 1).abs()
    torch.testing.assert_close(gate(summary), expected)
    gate.key.weight.copy_(found[:1])
    assert float(gate(summary[:1])) == pytest.approx(0.9640, abs=5e-5)
    assert not gate(torch.zeros(1, 8)).any()


def test_with_open_gates_it_learns_what_inflora_learns(
    backbone: Making, walk: Walking, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Gate.forward
    monkeypatch.setattr(Gate, "forward", lambda gate, summary: 0 * forward(gate, summary) + 1)
    gated, plain = (kind(backbone(), rank=4, optimizer=adam) for kind in (GainLoRA, InfLoRA))
    ours, theirs = walk(gated), walk(plain)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gated(images), plain(images), atol=1e-4, rtol=1e-4)
    assert gated.memory.dims == plain.memory.dims


def test_old_adapters_and_gates_and_every_down_projection_stay(watched: Watched) -> None:
    assert [len(one) for one in watched.kept] == [(2 * 2 * 2 + 3) * number for number in (1, 2, 3)]
    for then in watched.kept[:-1]:
        assert all(torch.equal(value, watched.kept[-1][name]) for name, value in then.items())
    newest = watched._newest()
    assert len(newest) == 4 and not any(adapter.A.requires_grad for _, adapter in newest)


def test_a_key_starts_as_the_strongest_direction_that_old_images_leave(watched: Watched) -> None:
    for found, free, key in zip(watched.inputs[::2], watched.free, watched.keys, strict=True):
        moment = found["key"].double().mT @ found["key"].double()
        left = np.linalg.svd((free["key"].double() @ moment).detach().numpy())[0][:, 0]
        assert abs(float(F.normalize(key.double())[0] @ torch.from_numpy(left))) == pytest.approx(1, abs=1e-5)


def test_a_new_gate_differs_from_the_last_only_where_old_images_have_nothing(watched: Watched) -> None:
    for index in (1, 2):
        old, new, free = watched._gate(index - 1), watched._gate(index), watched.free[index]
        for change, name in (
            (new.inner.weight - old.inner.weight, "inner"),
            (new.outer.weight - old.outer.weight, "outer"),
            (new.key.weight, "key"),
        ):
            assert change.abs().max() > 1e-3
            torch.testing.assert_close(change @ free[name], change, atol=1e-5, rtol=0)
            assert free[name].trace() < len(free[name]) - 0.5


def test_a_new_gate_is_closed_for_inputs_that_are_protected_in_full(tiny_backbone: Making) -> None:
    torch.manual_seed(0)
    strategy, old, new = GainLoRA(tiny_backbone(), gate_width=16), torch.randn(5, 32), torch.randn(5, 32)
    strategy.expand(Experience(0, 2, range(2)))
    for name, seen in stages(strategy._gate(0), old).items():
        basis = torch.linalg.qr(seen.detach().double().mT).Q
        strategy.get_buffer(f"free_{name}").sub_(basis @ basis.mT)
    strategy.expand(Experience(1, 2, range(2, 4)))
    with torch.no_grad():
        for value in strategy._gate(1).parameters():
            value.add_(torch.randn_like(value))
        assert strategy._gate(1)(old).max() > 0.1
        strategy.after_step()
        assert strategy._gate(1)(old).max() < 1e-5
        assert strategy._gate(1)(new).max() > 0.1


def test_what_a_gate_protects_is_what_gpm_protects(watched: Watched) -> None:
    """The projectors are those onto the complement of GPM's bases, from an independent memory."""
    for name, width in (("inner", 32), ("outer", 16), ("key", 32)):
        memory = GPM(1, width, "covariance", torch.float64)
        for index, found in enumerate(watched.inputs[1::2]):
            moment = (found[name].double().mT @ found[name].double() / len(found[name])).detach()
            memory.update(moment[None], below_first(energy_threshold(index, 3, 0.9)))
            left = memory.residual(torch.eye(width, dtype=torch.float64), 0)
            free = watched.free[index + 1][name] if index < 2 else watched.get_buffer(f"free_{name}")
            torch.testing.assert_close(free.double(), left, atol=1e-5, rtol=0)


def test_a_gate_opens_for_each_image_whatever_its_neighbours(watched: Watched) -> None:
    watched.eval()
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([watched(image[None]) for image in images])
    torch.testing.assert_close(watched(images), alone, atol=1e-5, rtol=1e-5)
    factors = watched._gate(1)(watched.summary(images))
    assert factors.max() - factors.min() > 1e-3


def test_projectors_lose_whole_dimensions() -> None:
    moment = torch.diag(torch.tensor([5.0, 3.0, 1.0, 0.0]))
    free = narrowed(torch.eye(4), moment, lambda shares, held: [1 - held[0]])
    assert torch.equal(narrowed(free, moment, lambda shares, held: [1 - held[0]]), free)
    torch.testing.assert_close(free, torch.diag(torch.tensor([0.0, 1.0, 1.0, 1.0])))
