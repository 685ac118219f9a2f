from __future__ import annotations

import pytest
import torch

from cl_bench.network.heads import (
    Features,
    GrowingCosine,
    GrowingLinear,
    Head,
    Prototypes,
    TrainableHead,
    pooled,
)


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


# What a strategy needs of a head


@pytest.mark.parametrize("head", [GrowingLinear(8), GrowingCosine(8), Prototypes(8)])
def test_every_head_serves_a_strategy(head: Head, features: torch.Tensor) -> None:
    assert isinstance(head, Head)
    assert head.num_classes == 0
    for classes, seen in ((2, 2), (3, 5)):
        head.grow(classes)
        assert head.num_classes == seen
        assert head(features).shape == (4, seen)


def test_only_heads_with_logits_of_the_current_classes_can_be_trained() -> None:
    assert isinstance(GrowingLinear(8), TrainableHead) and isinstance(GrowingCosine(8), TrainableHead)
    assert not isinstance(Prototypes(8), TrainableHead)
    assert not isinstance(torch.nn.Linear(8, 2), Head)


def test_the_features_to_classify_are_pooled_from_whatever_a_method_returns(features: torch.Tensor) -> None:
    assert pooled(features) is features
    assert pooled(Features(features, extra={"similarity": torch.ones(4, 2)})) is features


# Linear heads


def grown(sizes: list[int], *, seed: int = 0, bias: bool = True) -> GrowingLinear:
    torch.manual_seed(seed)
    head = GrowingLinear(feature_dim=8, bias=bias)
    for size in sizes:
        head.grow(size)
    return head


def test_growing_keeps_the_logits_of_older_classes(features: torch.Tensor) -> None:
    head = grown([2])
    before = head(features)
    head.grow(3)
    assert torch.equal(head(features)[:, :2], before)
    assert head.num_classes == 5


def test_current_logits_are_the_last_columns_of_all_logits(features: torch.Tensor) -> None:
    head = grown([2, 3])
    assert torch.equal(head.current(features), head(features)[:, 2:])


def test_writing_the_newest_part_leaves_older_parts_as_they_are(features: torch.Tensor) -> None:
    head = grown([3, 2])
    older = head(features)[:, :3]
    weight = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    head.write_current(weight)
    torch.testing.assert_close(head.current(features), features @ weight.T)
    assert torch.equal(head(features)[:, :3], older)
    with pytest.raises(ValueError, match="give a row of 8 for each"):
        head.write_current(weight[:1])


def test_only_the_newest_part_is_trained(features: torch.Tensor) -> None:
    head = grown([2, 3])
    head(features).sum().backward()
    assert [parameter.grad is not None for parameter in head.parameters()] == [False, False, True, True]
    assert sum(p.numel() for p in head.parameters() if p.requires_grad) == 3 * (8 + 1)


def test_a_head_without_bias_maps_the_zero_feature_to_zero() -> None:
    zero = torch.zeros(1, 8)
    assert not grown([2, 3], bias=False)(zero).any()
    assert grown([2, 3])(zero).all()


def test_a_fresh_linear_head_of_the_saved_sizes_loads_the_saved_state(features: torch.Tensor) -> None:
    saved = grown([2, 1])
    fresh = grown(saved.sizes, seed=1)
    assert not torch.equal(fresh(features), saved(features))
    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(fresh(features), saved(features))


def test_a_head_from_means_gives_thirty_times_the_cosine_at_average_length(
    features: torch.Tensor,
) -> None:
    head = grown([3, 2])
    older, means = head(features)[:, :3], torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    head.start_from(means)
    average = means.norm(dim=1).square().mean().sqrt()
    scaled = average * torch.nn.functional.normalize(features)
    cosines = torch.nn.functional.cosine_similarity(features[:, None], means[None], dim=2)
    torch.testing.assert_close(head.current(scaled), 30 * cosines)
    assert torch.equal(head(features)[:, :3], older)


# Heads by angle


def grown_by_angle(sizes: list[int], *, seed: int = 0) -> GrowingCosine:
    torch.manual_seed(seed)
    head = GrowingCosine(feature_dim=8)
    for size in sizes:
        head.grow(size)
    return head


def test_logits_by_angle_are_cosines_and_ignore_every_length(features: torch.Tensor) -> None:
    head = grown_by_angle([2, 3])
    weights = torch.cat([weight.detach() for weight in head.parameters()])
    expected = torch.nn.functional.cosine_similarity(features[:, None], weights[None], dim=2)
    torch.testing.assert_close(head(features).detach(), expected)
    for weight in head.parameters():
        weight.data *= 7
    torch.testing.assert_close(head(3 * features).detach(), expected)


def test_growing_by_angle_keeps_older_cosines_and_trains_only_the_newest_part(
    features: torch.Tensor,
) -> None:
    head = grown_by_angle([2])
    before = head(features)
    head.grow(3)
    assert torch.equal(head(features)[:, :2], before)
    assert torch.equal(head.current(features), head(features)[:, 2:])
    head(features).sum().backward()
    assert [weight.grad is not None for weight in head.parameters()] == [False, True]
    assert sum(weight.numel() for weight in head.parameters() if weight.requires_grad) == 3 * 8


def test_weights_by_angle_start_with_deviation_0_02() -> None:
    torch.manual_seed(0)
    head = GrowingCosine(feature_dim=100)
    head.grow(100)
    weights = next(head.parameters())
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(weights.mean().item()) < 1e-3


def test_cosines_keep_full_precision_under_mixed_precision(features: torch.Tensor) -> None:
    head = grown_by_angle([2, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, current = head(features), head.current(features)
    assert torch.equal(mixed, head(features)) and torch.equal(current, head.current(features))


def test_a_fresh_head_by_angle_of_the_saved_sizes_loads_the_saved_state(features: torch.Tensor) -> None:
    saved = grown_by_angle([2, 1])
    fresh = grown_by_angle(saved.sizes, seed=1)
    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(fresh(features), saved(features))


# Prototypes


def test_cosine_prototypes_ignore_the_length_of_features_and_means(features: torch.Tensor) -> None:
    head = Prototypes(feature_dim=8)
    head.grow(3)
    means = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    head.write(means, range(0, 3))
    expected = torch.nn.functional.cosine_similarity(features[:, None], means[None], dim=2)
    torch.testing.assert_close(head(features), expected)
    head.write(5 * means, range(0, 3))
    torch.testing.assert_close(head(3 * features), expected)


def test_euclidean_prototypes_give_the_negative_distance() -> None:
    head = Prototypes(feature_dim=2, similarity="euclidean")
    head.grow(2)
    head.write(torch.tensor([[0.0, 0.0], [3.0, 0.0]]), range(0, 2))
    assert torch.equal(head(torch.tensor([[3.0, 4.0]])), torch.tensor([[-5.0, -4.0]]))


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_prototype_logits_do_not_depend_on_the_class_order(similarity: str, features: torch.Tensor) -> None:
    means = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    order = [3, 0, 5, 1, 4, 2]
    one, other = Prototypes(8, similarity), Prototypes(8, similarity)  # type: ignore[arg-type]
    one.grow(6)
    one.write(means, range(0, 6))
    for start in (0, 2, 4):
        other.grow(2)
        other.write(means[order[start : start + 2]], range(start, start + 2))
    torch.testing.assert_close(other(features), one(features)[:, order], rtol=0, atol=1e-6)


def test_prototype_logits_keep_full_precision_under_mixed_precision(features: torch.Tensor) -> None:
    for similarity in ("cosine", "euclidean"):
        head = Prototypes(8, similarity)
        head.grow(3)
        head.write(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)), range(0, 3))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = head(features)
        assert torch.equal(mixed, head(features))


def test_writing_new_means_leaves_old_ones_untouched() -> None:
    head = Prototypes(feature_dim=8)
    head.grow(2)
    head.write(torch.ones(2, 8), range(0, 2))
    head.grow(1)
    head.write(torch.full((1, 8), 2.0), range(2, 3))
    assert head.means[:, 0].tolist() == [1.0, 1.0, 2.0]


def test_fresh_prototypes_of_the_saved_sizes_load_the_saved_state(
    features: torch.Tensor,
) -> None:
    saved, fresh = Prototypes(feature_dim=8), Prototypes(feature_dim=8)
    for size in (2, 1):
        saved.grow(size)
    saved.write(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)), range(0, 3))
    for size in saved.sizes:
        fresh.grow(size)
    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(fresh(features), saved(features))


def test_means_for_classes_that_the_head_does_not_have_are_refused() -> None:
    head = Prototypes(feature_dim=8)
    head.grow(2)
    with pytest.raises(ValueError, match="do not have positions 2 to 3: grow"):
        head.write(torch.ones(2, 8), range(2, 4))


def test_means_of_another_shape_are_refused() -> None:
    head = Prototypes(feature_dim=8)
    head.grow(2)
    with pytest.raises(ValueError, match=r"\(1, 8\) do not fit 2 classes: give a row of 8 for each"):
        head.write(torch.ones(1, 8), range(0, 2))


@pytest.mark.parametrize("head", [GrowingLinear(8), GrowingCosine(8), Prototypes(8)])
def test_growing_by_zero_classes_is_refused(head: GrowingLinear | Prototypes) -> None:
    with pytest.raises(ValueError, match="cannot grow by 0 classes"):
        head.grow(0)
