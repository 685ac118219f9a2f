from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.contracts.strategy import TrainingData
from cl_bench.data.experience import Batch, Experience
from cl_bench.network.backbones import Backbone
from strategies.cl_lora import CLLoRA, multipliers

Making = Callable[..., Backbone]


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def drawn(backbone: Backbone, experiences: int = 2) -> CLLoRA:
    """Experiences of two classes each, whose shared up-projections are not zero, in double precision."""
    torch.manual_seed(0)
    strategy = CLLoRA(backbone, rank=3)
    for index in range(experiences):
        if index:
            for layer in strategy.shared:
                for third in "qv":
                    layer.adapter(third).B.data.normal_(std=0.3)
        strategy.expand(Experience(index, 3, range(2 * index, 2 * index + 2)))
    return strategy.double()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def test_shared_down_projections_are_orthonormal_and_never_move(
    backbone: Making, walk: Callable[..., Any]
) -> None:
    seen: list[list[Tensor]] = []

    class Watched(CLLoRA):
        def before_training(self, data: TrainingData) -> None:
            seen.append([adapter.A.detach().clone() for adapter in self._shared()])

    strategy = Watched(backbone(), rank=3, optimizer=sgd)
    walk(strategy)
    for adapter, *before in zip(strategy._shared(), *seen, strict=True):
        rows = adapter.A.detach()
        torch.testing.assert_close(rows @ rows.T, torch.eye(3), rtol=0, atol=1e-6)
        assert all(torch.equal(adapter.A, one) for one in before)
        assert adapter.B.any()


def test_each_experience_starts_from_orthonormal_rows_and_a_scale_of_1(
    backbone: Making, walk: Callable[..., Any]
) -> None:
    starts, ends = [], []

    class Watched(CLLoRA):
        def before_training(self, data: TrainingData) -> None:
            starts.append(float(self.temper))
            for layer in self.specific:
                for name in self._rows(self.experience.index):
                    rows = layer.adapter(name).A.detach()
                    torch.testing.assert_close(rows @ rows.T, torch.eye(3), rtol=0, atol=1e-6)

        def after_training(self, data: TrainingData) -> None:
            super().after_training(data)
            ends.append(float(self.temper))

    walk(Watched(backbone(), rank=3, optimizer=sgd))
    assert starts == [1.0, 1.0, 1.0]
    assert 1.0 not in ends


def test_adapters_and_block_weights_of_old_experiences_stay(
    backbone: Making, walk: Callable[..., Any]
) -> None:
    seen: list[dict[str, Tensor]] = []

    class Watched(CLLoRA):
        def after_training(self, data: TrainingData) -> None:
            super().after_training(data)
            seen.append(self.specific[0].adapters.state_dict(keep_vars=False))
            seen[-1] = {name: tensor.clone() for name, tensor in seen[-1].items()}

    strategy = Watched(backbone(), rank=3, optimizer=sgd)
    walk(strategy)
    assert [len(one) for one in seen] == [6, 12, 18]  # A, B and a weight, of queries and of values
    for then in seen[:-1]:
        assert all(torch.equal(tensor, seen[-1][name]) for name, tensor in then.items())


def test_a_new_experience_starts_from_the_shared_part_and_leaves_old_logits(tiny_backbone: Making) -> None:
    strategy = drawn(tiny_backbone(), experiences=1)
    for layer in strategy.layers:
        for third in "qv":
            layer.adapter(third).B.data.normal_(std=0.3)
    strategy.head.means.normal_()
    logits = strategy(images())
    strategy.expand(Experience(1, 3, range(2, 4)))
    strategy.double()
    assert torch.equal(strategy(images())[:, :2], logits)
    found = strategy.features(images())
    shared_only = copy.deepcopy(strategy)
    for layer in shared_only.specific:
        layer.merge()  # and so zero both up-projections, which add nothing
        assert torch.equal(layer.weight, strategy.specific[0].weight)
    torch.testing.assert_close(found, shared_only.features(images()), rtol=0, atol=1e-12)


def test_the_logits_of_a_class_are_cosines_under_the_adapters_of_its_experience(
    tiny_backbone: Making,
) -> None:
    """Against a model that has, merged into its weights, nothing but the adapters of one experience."""
    strategy = drawn(tiny_backbone(), experiences=3)
    strategy.head.means.normal_()
    for layer in strategy.specific:
        for name in ("q", "v", "q_1", "v_1", "q_2", "v_2"):
            layer.adapter(name).B.data.normal_(std=0.3)
    expected = []
    for index, names in enumerate((("q", "v"), ("q_1", "v_1"), ("q_2", "v_2"))):
        plain = tiny_backbone().double()
        for block, layer in zip(plain.blocks, strategy.layers, strict=True):
            weight = block.get_parameter("attn.qkv.weight")
            for third, name in zip((slice(0, 32), slice(64, 96)), names, strict=True):
                adapter = layer.adapter(name if layer in strategy.specific else name[0])
                weight.data[third] += adapter.scale * adapter.B.data @ adapter.A.data
        prototypes = strategy.head.means[2 * index : 2 * index + 2]
        features = plain(images())
        expected.append(F.cosine_similarity(features[:, None], prototypes[None], dim=2))
    torch.testing.assert_close(strategy(images()), torch.cat(expected, dim=1), rtol=0, atol=1e-10)


# Distillation


def test_distillation_starts_at_the_entropy_of_the_teacher_without_a_gradient(tiny_backbone: Making) -> None:
    strategy = drawn(tiny_backbone())
    loss = strategy.distillation(images())
    teacher = (strategy._logits(strategy._exit(images(), strategy._thirds)) / 2).softmax(dim=1)
    torch.testing.assert_close(loss, torch.distributions.Categorical(teacher).entropy().sum())
    gradients = torch.autograd.grad(loss, [adapter.B for adapter in strategy._shared()])
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients)


def test_distillation_pulls_the_shared_adapters_back(tiny_backbone: Making) -> None:
    strategy = drawn(tiny_backbone())
    for adapter in strategy._shared():
        adapter.B.data += 0.5 * torch.randn_like(adapter.B)
    before = strategy.distillation(images())
    tensors = strategy._distilled()[:-2]
    for tensor, gradient in zip(tensors, torch.autograd.grad(before, tensors), strict=True):
        tensor.data -= 1e-3 * gradient
    assert strategy.distillation(images()) < before


def test_the_exit_after_all_blocks_would_be_the_feature(tiny_backbone: Making) -> None:
    strategy = drawn(tiny_backbone(normalisation="half"))
    strategy.early = 2
    torch.testing.assert_close(strategy._exit(images(), strategy._thirds), strategy.features(images()))


def test_multipliers_are_1_on_average_and_0_at_an_empty_projection() -> None:
    up = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(multipliers(up).mean(), torch.tensor(1.0))
    assert not multipliers(torch.zeros(8, 3)).any()


def test_a_step_of_distillation_moves_no_specific_adapter(backbone: Making, walk: Callable[..., Any]) -> None:
    moved: list[set[str]] = []

    class Watched(CLLoRA):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            if self.experience.index == 1:
                before = {name: p.detach().clone() for name, p in self.named_parameters()}
                self._distil(batch[0])
                now = self.named_parameters()
                moved.append({name for name, p in now if not torch.equal(p, before[name])})
            return super().training_step(batch, batch_idx)

    walk(Watched(backbone(), rank=3, optimizer=sgd))
    assert len(moved) > 1
    allowed = {
        "weight",
        "temper",
        *(f"backbone.vit.blocks.0.attn.qkv.adapters.{third}.B" for third in "qv"),
    }
    assert set().union(*moved) == allowed


# The overlap of block weights


def test_the_overlap_is_the_mean_absolute_cosine_to_older_block_weights(tiny_backbone: Making) -> None:
    strategy = drawn(tiny_backbone(), experiences=3)
    values = {"q": 1.0, "v": 0.0, "q_1": -3.0, "v_1": 4.0, "q_2": 2.0, "v_2": 0.0}
    (layer,) = strategy.specific
    for name, value in values.items():
        layer.adapter(name).scale.data.fill_(value)  # type: ignore[union-attr]
    assert strategy.overlap().item() == pytest.approx((1.0 + 0.6) / 2)


@pytest.mark.parametrize(("rank", "derived"), ((10, 276_498), (8, 221_202)))
def test_trained_parameters_on_vit_b_are_those_of_the_code_without_the_weights_of_keys(
    rank: int, derived: int
) -> None:
    vit = Backbone("vit_base_patch16_224.augreg_in21k", "random")
    strategy = CLLoRA(vit, rank=rank)
    for index in range(3):
        strategy.expand(Experience(index, 3, range(20 * index, 20 * index + 20)))
        assert strategy.trainable_parameters == derived - 6 + 768 * 20 + 1


def test_a_backbone_of_one_block_is_refused(tiny_backbone: Making) -> None:
    with pytest.raises(ValueError, match="two halves: choose a backbone of two or more"):
        CLLoRA(tiny_backbone(depth=1))
