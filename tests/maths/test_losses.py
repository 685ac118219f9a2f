from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.maths.losses import (
    augmented_triplet,
    cosface,
    cosine_similarities,
    danger_score,
    decoupled_margin,
    local_cross_entropy,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
def test_a_label_of_another_experience_is_an_error(label: int) -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        local_cross_entropy(torch.zeros(2, 2), torch.tensor([100, label]), first_class=100)


def test_cosface_is_the_softmax_in_which_the_own_cosine_gives_up_the_margin() -> None:
    cosines, labels = normal(6, 4).tanh(), [7, 9, 8, 10, 7, 9]
    losses = []
    for row, label in zip(cosines.tolist(), labels, strict=True):
        own = math.exp(20 * (row[label - 7] - 0.15))
        others = sum(math.exp(20 * cosine) for column, cosine in enumerate(row) if column != label - 7)
        losses.append(-math.log(own / (own + others)))
    found = cosface(cosines, torch.tensor(labels), first_class=7, scale=20, margin=0.15)
    assert found.item() == pytest.approx(sum(losses) / 6, rel=1e-12)


def test_cosface_without_margin_is_the_scaled_softmax() -> None:
    cosines, labels = normal(6, 4).tanh(), torch.tensor([7, 9, 8, 10, 7, 9])
    found = cosface(cosines, labels, first_class=7, scale=5)
    assert torch.equal(found, F.cross_entropy(5 * cosines, labels - 7))
    assert cosface(cosines, labels, first_class=7, scale=5, margin=0.1) > found


@pytest.mark.parametrize("label", [0, 99, 102])
def test_for_cosface_a_label_of_another_experience_is_an_error(label: int) -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        cosface(torch.zeros(2, 2), torch.tensor([100, label]), first_class=100)


def test_decoupled_margin_by_hand() -> None:
    # Cosines to the prototypes: (1, 0.6, 0), (0, 0.8, 1) and (-1, -0.6, 0).
    features = torch.tensor([[2.0, 0.0], [0.0, 0.5], [-1.0, 0.0]])
    prototypes = torch.tensor([[3.0, 0.0], [0.3, 0.4], [0.0, 1.0]])
    nearest = decoupled_margin(features, prototypes, margin=0.5)
    assert nearest.item() == pytest.approx((0.5 + 0.5 + 0) / 3)
    too_near = decoupled_margin(features, prototypes, margin=0.5, reduction="all")
    assert too_near.item() == pytest.approx(((0.5 + 0.1) / 2 + (0.3 + 0.5) / 2 + 0) / 3)


@pytest.mark.parametrize("reduction", ["nearest", "all"])
def test_decoupled_margin_is_zero_without_prototypes_or_nearness(reduction: str) -> None:
    features = normal(5, 8).requires_grad_()
    for prototypes, margin in ((normal(0, 8), -1.0), (normal(3, 8, seed=1), 1.0)):
        loss = decoupled_margin(features, prototypes, margin, reduction)  # type: ignore[arg-type]
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, features)[0].any()


def test_decoupled_margin_turns_a_feature_away_from_the_nearest_prototype() -> None:
    features, prototypes = normal(5, 8).requires_grad_(), normal(3, 8, seed=1)
    loss = decoupled_margin(features, prototypes, margin=-1.0)
    (gradient,) = torch.autograd.grad(loss, features)
    directions, targets = F.normalize(features.detach()), F.normalize(prototypes)
    cosines, nearest = (directions @ targets.T).max(dim=1)
    tangent = targets[nearest] - cosines[:, None] * directions
    torch.testing.assert_close(gradient, tangent / features.detach().norm(dim=1, keepdim=True) / 5)
    torch.testing.assert_close((gradient * directions).sum(1), torch.zeros(5).double(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("reduction", ["nearest", "all"])
def test_decoupled_margin_ignores_the_length_of_features_and_prototypes(reduction: str) -> None:
    features, prototypes = normal(5, 8), normal(3, 8, seed=1)
    one = decoupled_margin(features, prototypes, 0.1, reduction)  # type: ignore[arg-type]
    other = decoupled_margin(7 * features, 0.2 * prototypes, 0.1, reduction)  # type: ignore[arg-type]
    assert one > 0.01
    torch.testing.assert_close(other, one, rtol=0, atol=1e-15)


def triplet_by_loops(features: Tensor, labels: list[int], prototypes: Tensor, margin: float) -> float:
    points, old = F.normalize(features), F.normalize(prototypes)
    losses = []
    for i, label in enumerate(labels):
        to = [(points[i] - point).norm().item() for point in points]
        positive = max(distance for distance, other in zip(to, labels, strict=True) if other == label)
        negatives = [distance for distance, other in zip(to, labels, strict=True) if other != label]
        negatives += [(points[i] - prototype).norm().item() for prototype in old]
        losses.append(max(0, positive - min(negatives) + margin) if negatives else 0)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("labels", [[3, 3, 4, 4, 5, 3], [3, 3, 3, 3, 3, 3], [3, 4, 5, 6, 7, 8]])
@pytest.mark.parametrize("prototypes", [0, 4])
@pytest.mark.parametrize("margin", [0.05, 1.0])
def test_augmented_triplet_is_the_hardest_triplet_of_every_feature(
    labels: list[int], prototypes: int, margin: float
) -> None:
    features, old = normal(6, 8), normal(prototypes, 8, seed=1)
    found = augmented_triplet(features, torch.tensor(labels), old, margin)
    assert found.item() == pytest.approx(triplet_by_loops(features, labels, old, margin), abs=1e-12)


def test_augmented_triplet_has_a_finite_gradient_for_a_feature_on_its_own() -> None:
    features = normal(3, 8).requires_grad_()
    loss = augmented_triplet(features, torch.tensor([3, 4, 4]), normal(2, 8, seed=1), margin=2.0)
    (gradient,) = torch.autograd.grad(loss, features)
    assert gradient.isfinite().all() and gradient[0].any()
    torch.testing.assert_close((gradient * features).sum(1), torch.zeros(3).double(), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "loss",
    [
        lambda features, prototypes: decoupled_margin(features, prototypes, margin=-1.0),
        lambda features, prototypes: decoupled_margin(features, prototypes, margin=-1.0, reduction="all"),
        lambda features, prototypes: augmented_triplet(features, torch.arange(5), prototypes, margin=2.0),
    ],
)
def test_prototypes_get_no_gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    features, prototypes = normal(5, 8).requires_grad_(), normal(3, 8, seed=1).requires_grad_()
    gradients = torch.autograd.grad(loss(features, prototypes), (features, prototypes), allow_unused=True)
    assert gradients[0] is not None and gradients[0].any()
    assert gradients[1] is None


@pytest.mark.parametrize("measure", [cosine_similarities, decoupled_margin, danger_score])
def test_angles_keep_full_precision_under_mixed_precision(
    measure: Callable[[Tensor, Tensor], Tensor],
) -> None:
    features, prototypes = normal(5, 8).float(), normal(3, 8, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = measure(features, prototypes)
    assert torch.equal(mixed, measure(features, prototypes))
    assert measure(features.bfloat16(), prototypes).dtype == torch.float32
    assert measure(features, prototypes.double()).dtype == torch.float64


def test_cosine_similarities_are_those_of_each_pair() -> None:
    features, prototypes = normal(5, 8), normal(3, 8, seed=1)
    expected = F.cosine_similarity(features[:, None], prototypes[None], dim=2)
    torch.testing.assert_close(cosine_similarities(features, prototypes), expected)


def test_danger_is_the_mean_cosine_to_the_nearest_prototype() -> None:
    features, prototypes = normal(5, 8), normal(3, 8, seed=1)
    expected = F.cosine_similarity(features[:, None], prototypes[None], dim=2).max(dim=1).values.mean()
    torch.testing.assert_close(danger_score(features, prototypes), expected)


def test_danger_without_a_prototype_is_refused() -> None:
    with pytest.raises(ValueError, match="no old prototype: compute the score from the second experience on"):
        danger_score(normal(5, 8), normal(0, 8))
