from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cl_bench.bench.floor import Floor
from cl_bench.bench.subject import Subject
from cl_bench.network.heads import GrowingLinear


@pytest.mark.parametrize("stem", ["lora", "inflora", "keeplora"])
def test_the_floor_learns_what_the_strategy_learns(subject: Callable[..., Subject], stem: str) -> None:
    ours = subject(stem)
    floor = Floor(ours.strategy, 2, half=False)
    images, labels = ours.batch(4)
    (optimizer,) = ours.trainer.optimizers
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = floor.optimizer.param_groups[0]["lr"], 0.0
    assert isinstance(ours.strategy.head, GrowingLinear)
    floor.model[1].load_state_dict(ours.strategy.head.parts[-1].state_dict())

    with torch.no_grad():
        before = ours.strategy.features(images)
    for _ in range(20):
        ours.step((images, labels))
        floor.step((images, labels - 2))
    with torch.no_grad():
        theirs, own = floor.model[0](images), ours.strategy.features(images)
    moved = (own - before).norm()
    assert moved > 1e-2
    assert (own - theirs).norm() < 0.02 * moved


def test_the_floor_of_a_step_in_half_precision_has_the_same_function(subject: Callable[..., Subject]) -> None:
    ours = subject("lora", precision="bf16-mixed")
    floor = Floor(ours.strategy, 2, half=True)
    images, _ = ours.batch(4)
    with torch.no_grad(), floor.precision("cpu"):
        theirs, own = floor.model[0](images), ours.strategy.features(images)
    assert torch.equal(theirs, own)
    full = Floor(ours.strategy, 2, half=False)
    assert not torch.equal(full.model[0](images), own)


def test_in_half_precision_the_floor_keeps_what_is_frozen_in_half_precision_alone(
    subject: Callable[..., Subject],
) -> None:
    floor = Floor(subject("lora", precision="bf16-mixed").strategy, 2, half=True)
    weights = {name: p for name, p in floor.model[0].named_parameters() if p.ndim in (2, 4)}
    frozen = {name for name, weight in weights.items() if not weight.requires_grad}
    assert frozen == {name for name, weight in weights.items() if weight.dtype == torch.bfloat16}
    assert len(frozen) == 1 + 4 * 2  # patches, and four layers in each block


def test_the_memory_of_the_floor_is_that_of_separate_factors(subject: Callable[..., Subject]) -> None:
    ours = subject("inflora")  # which trains what keys and values have, and queries have nothing
    images, labels = ours.batch(4)
    floor = Floor(ours.strategy, 2, half=False)
    floor.step((images, labels - 2))
    backbone = sum(parameter.numel() for parameter in ours.strategy.backbone.vit.parameters())
    depth, width, rank, classes, tensors = 2, 64, 10, 2, 4
    head = classes * (width + 1)
    trained = depth * 2 * width * rank + head
    averages_and_steps = 2 * trained + tensors
    assert floor.held_bytes == 4 * (backbone + head + averages_and_steps)


def test_the_floor_leaves_the_strategy_as_it_was(subject: Callable[..., Subject]) -> None:
    ours = subject("lora")
    before = {name: tensor.clone() for name, tensor in ours.strategy.state_dict().items()}
    floor = Floor(ours.strategy, 2, half=False)
    images, labels = ours.batch(4)
    floor.step((images, labels - 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.strategy.state_dict().items())


def test_nothing_of_ours_is_in_the_floor(subject: Callable[..., Subject]) -> None:
    floor = Floor(subject("inflora").strategy, 2, half=False)
    own = {type(module) for module in floor.model.modules() if type(module).__module__.startswith("cl_bench")}
    assert {module.__module__ for module in own} == {"cl_bench.bench.floor"}
