from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cl_bench.bench.command import held_bytes
from cl_bench.bench.floor import Floor
from cl_bench.bench.subject import Subject
from cl_bench.contracts.prompted import PromptedStrategy
from cl_bench.data.experience import Batch, Experience
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import GrowingLinear
from strategies.bilora import BiLoRA
from strategies.coda_prompt import CODAPrompt
from strategies.dualprompt import DualPrompt
from strategies.l2p import L2P

During = Callable[[Subject, Callable[[], None]], None]


@pytest.mark.parametrize("stem", ["lora", "inflora", "keeplora"])
def test_the_floor_learns_what_the_strategy_learns(subject: Callable[..., Subject], stem: str) -> None:
    ours = subject(stem)
    distances: list[float] = []

    def steps() -> Iterator[Batch]:
        strategy, floor = ours.strategy, Floor(ours.strategy, 2, half=False)
        images, labels = ours.stream.batch(4)
        (optimizer,) = ours.trainer.optimizers
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = floor.optimizer.param_groups[0]["lr"], 0.0
        assert isinstance(strategy.head, GrowingLinear)
        floor.model[1].load_state_dict(strategy.head.parts[-1].state_dict())
        before = strategy.features(images).detach()
        for _ in range(20):
            yield images, labels
            floor.step((images, labels - 2))
        with torch.no_grad():
            theirs, own = floor.model[0](images), strategy.features(images)
        distances.extend([float((own - before).norm()), float((own - theirs).norm())])

    ours.run(steps())
    moved, distance = distances
    assert moved > 1e-2
    assert distance < 0.02 * moved


def test_a_floor_in_half_precision_computes_the_same_function(
    subject: Callable[..., Subject], during: During
) -> None:
    ours = subject("lora", precision="bf16-mixed")

    @torch.no_grad()
    def compared() -> None:
        floor, full = (Floor(ours.strategy, 2, half=half) for half in (True, False))
        images, _ = ours.stream.batch(4)
        with torch.autocast("cpu", torch.bfloat16):
            theirs = floor.model[0](images)
        own = ours.strategy.features(images)
        assert torch.equal(theirs, own)
        assert not torch.equal(full.model[0](images), own)

    during(ours, compared)


def test_a_floor_in_half_precision_keeps_frozen_weights_only_in_half_precision(
    subject: Callable[..., Subject],
) -> None:
    floor = Floor(subject("lora", precision="bf16-mixed").strategy, 2, half=True)
    weights = {name: p for name, p in floor.model[0].named_parameters() if p.ndim in (2, 4)}
    frozen = {name for name, weight in weights.items() if not weight.requires_grad}
    assert frozen == {name for name, weight in weights.items() if weight.dtype == torch.bfloat16}
    assert len(frozen) == 1 + 4 * 2  # patches, and four layers in each block


def test_the_floor_leaves_the_strategy_and_keeps_what_separate_factors_need(
    subject: Callable[..., Subject], during: During
) -> None:
    ours = subject("inflora")  # it trains B of keys and values, and nothing of queries

    def measured() -> None:
        before = {name: tensor.clone() for name, tensor in ours.strategy.state_dict().items()}
        floor = Floor(ours.strategy, 2, half=False)
        images, labels = ours.stream.batch(4)
        floor.step((images, labels - 2))
        assert all(torch.equal(tensor, before[name]) for name, tensor in ours.strategy.state_dict().items())
        backbone = sum(parameter.numel() for parameter in ours.strategy.backbone.vit.parameters())
        depth, width, rank, classes, tensors = 2, 64, 10, 2, 4
        head = classes * (width + 1)
        trained = depth * 2 * width * rank + head
        averages_and_steps = 2 * trained + tensors
        held = held_bytes(floor.model, floor.optimizer) - floor.unused_bytes
        assert held == 4 * (backbone + head + averages_and_steps)

    during(ours, measured)


def test_the_floor_has_no_layer_of_ours(subject: Callable[..., Subject]) -> None:
    floor = Floor(subject("inflora").strategy, 2, half=False)
    own = {type(module) for module in floor.model.modules() if type(module).__module__.startswith("cl_bench")}
    assert {module.__module__ for module in own} == {"cl_bench.bench.floor"}


# Prompts


def drawn(kind: Callable[..., PromptedStrategy], backbone: Backbone, **settings: object) -> PromptedStrategy:
    torch.manual_seed(0)
    strategy = kind(backbone, **settings)
    strategy.expand(Experience(0, 2, range(2)))
    return strategy


def test_the_floor_of_prompts_learns_what_the_strategy_learns(
    tiny_backbone: Callable[..., Backbone],
) -> None:
    """All images of an experience share DualPrompt's prefixes in training, as they do in the floor."""
    ours = drawn(DualPrompt, tiny_backbone(), general_blocks=[0], expert_blocks=[1])
    floor = Floor(ours, 2, half=False)
    assert isinstance(ours.head, GrowingLinear)
    floor.model[1].load_state_dict(ours.head.parts[-1].state_dict())
    optimizer = torch.optim.Adam([p for p in ours.parameters() if p.requires_grad], lr=1e-4)
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])
    before = ours.features(images).pooled.detach()
    torch.testing.assert_close(floor.model[0](images), before, rtol=0, atol=1e-6)
    for _ in range(20):
        floor.step((images, labels))
        optimizer.zero_grad()
        ours.batch_loss((images, labels)).backward()
        optimizer.step()
    theirs, own = floor.model[0](images).detach(), ours.features(images).pooled.detach()
    moved = (own - before).norm()
    assert moved > 1e-3
    assert (own - theirs).norm() < 0.02 * moved


@pytest.mark.parametrize(
    ("kind", "settings"),
    ((L2P, {"pool": 3, "chosen": 2}), (CODAPrompt, {"pool": 4, "blocks": [0, 1]})),
)
def test_the_floor_of_prompts_has_as_many_as_an_image_gets(
    kind: Callable[..., PromptedStrategy],
    settings: dict[str, object],
    tiny_backbone: Callable[..., Backbone],
) -> None:
    floor = Floor(drawn(kind, tiny_backbone(), **settings), 2, half=False)
    trained = sum(p.numel() for p in floor.model[0].parameters() if p.requires_grad)
    assert trained == (2 * 5 * 32 if kind is L2P else 2 * 8 * 32)
    before = [p.detach().clone() for p in floor.model.parameters()]
    floor.step((torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])))
    moved = {
        p.requires_grad
        for p, old in zip(floor.model.parameters(), before, strict=True)
        if not torch.equal(p, old)
    }
    assert moved == {True}


def test_the_floor_of_prompts_takes_the_operations_of_both_passes(
    tiny_backbone: Callable[..., Backbone],
) -> None:
    ours = drawn(DualPrompt, tiny_backbone(), general_blocks=[0], expert_blocks=[1], pull=0.0)
    floor, images, counted = Floor(ours, 2, half=False), torch.rand(4, 3, 8, 8), []
    for features in (floor.model[0], ours.features):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            features(images)
        counted.append(counter.get_total_flops())
    assert counted[1] - counted[0] == 2 * 4 * 32  # four queries meet a key of width 32


def test_a_strategy_whose_adapters_are_not_factors_has_no_floor(
    tiny_backbone: Callable[..., Backbone],
) -> None:
    strategy = BiLoRA(tiny_backbone(), frequencies=4)
    with pytest.raises(ValueError, match="pairs of factors and for prompts, and SpectralLinear adds"):
        Floor(strategy, 2, half=False)
