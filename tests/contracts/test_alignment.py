from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_bench.contracts.alignment import ClassifierAlignment, normalised
from cl_bench.contracts.strategy import Strategy
from cl_bench.data.experience import Experience
from cl_bench.measure.means import ClassCovariances
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import GrowingCosine
from cl_bench.processes.fingerprints import fingerprint

Making = Callable[..., Backbone]


class Aligned(ClassifierAlignment, Strategy):
    """A linear probe with aligned classifiers."""


class Images:
    """Twelve images of each class in ``classes``, one class darker than the next."""

    def __init__(self, classes: range) -> None:
        self.labels = torch.arange(classes.start, classes.stop).repeat_interleave(12)
        noise = torch.rand(len(self.labels), 3, 8, 8, generator=torch.Generator().manual_seed(classes.start))
        self.images = noise / (1 + self.labels)[:, None, None, None]

    def augmented(self) -> list[tuple[Tensor, Tensor]]:
        raise AssertionError("Gaussians are measured on plain images")

    def plain(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.images.split(5), self.labels.split(5), strict=True))


def learnt(backbone: Backbone, experiences: int, **settings: Any) -> Aligned:
    torch.manual_seed(0)
    strategy = Aligned(backbone, alignment=True, **settings).eval()
    for index in range(experiences):
        classes = range(2 * index, 2 * index + 2)
        strategy.expand(Experience(index, 3, classes))
        with torch.no_grad():
            strategy.after_training(Images(classes))
    return strategy


def test_the_covariance_is_that_of_torch() -> None:
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 2 + 4
    full, diagonal = (ClassCovariances(range(4, 6), diagonal=diagonal) for diagonal in (False, True))
    for some, own in zip(features.split(7), labels.split(7), strict=True):
        full.add(some, own)
        diagonal.add(some, own)
    expected = torch.stack([features[labels == label].T.cov() for label in (4, 5)])
    torch.testing.assert_close(full.covariance(), expected)
    torch.testing.assert_close(diagonal.covariance(), expected.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("covariance", ("full", "diagonal"))
def test_drawn_features_have_the_mean_and_covariance_of_their_class(
    tiny_backbone: Making, covariance: str
) -> None:
    strategy = learnt(tiny_backbone(), 1, covariance=covariance, alignment_samples=20_000)
    torch.manual_seed(3)
    features, labels = strategy.drawn()
    for label in range(2):
        own = features[labels == label]
        stored = strategy.covariances[label]
        expected = stored if covariance == "full" else stored.diag()
        expected = expected + 1e-4 * torch.eye(len(expected))
        error = (expected.diagonal() / len(own)).sqrt()
        assert ((own.mean(dim=0) - strategy.means[label]).abs() < 5 * error).all()
        variance = expected.diagonal()
        # The variance of an entry of the sample covariance is (s_ii s_jj + s_ij²) / n.
        spread = ((variance[:, None] * variance + expected.square()) / len(own)).sqrt()
        assert ((own.T.cov() - expected).abs() < 5 * spread).all()


def test_old_means_are_drawn_in_by_their_age(tiny_backbone: Making) -> None:
    strategy = learnt(tiny_backbone(), 2, alignment_epochs=1, alignment_samples=4)
    strategy.covariances.zero_()
    strategy.alignment_samples = 4000
    features, labels = strategy.drawn()
    for label, share in ((0, 0.95), (3, 1.0)):
        drawn = features[labels == label].mean(dim=0)
        torch.testing.assert_close(drawn, share * strategy.means[label], rtol=0, atol=1e-3)


def test_the_first_experience_is_not_aligned_and_later_ones_are(tiny_backbone: Making) -> None:
    first, second = (learnt(tiny_backbone(), count, alignment_epochs=1) for count in (1, 2))
    assert torch.equal(
        first.head.aligned[0].get_parameter("weight"), first.head.parts[0].get_parameter("weight")
    )
    for part, aligned in zip(second.head.parts, second.head.aligned, strict=True):
        assert not torch.equal(part.get_parameter("weight"), aligned.get_parameter("weight"))


def test_alignment_leaves_the_backbone_and_the_trained_heads(tiny_backbone: Making) -> None:
    strategy = learnt(tiny_backbone(), 1)
    kept = {name: int(fingerprint(value)) for name, value in strategy.state_dict().items()}
    strategy.expand(Experience(1, 3, range(2, 4)))
    newest = strategy.head.parts[1].get_parameter("weight").clone()
    with torch.no_grad():
        strategy.after_training(Images(range(2, 4)))
    after = {name: int(fingerprint(value)) for name, value in strategy.state_dict().items()}
    changed = {name for name, value in kept.items() if after[name] != value}
    assert changed == {"means", "covariances", "head.aligned.0.weight", "head.aligned.0.bias"}
    assert torch.equal(strategy.head.parts[1].get_parameter("weight"), newest)
    assert not any(p.requires_grad for p in strategy.head.aligned.parameters())


@pytest.mark.parametrize("temperature", (0.1, None))
def test_alignment_tells_apart_classes_whose_gaussians_are(
    tiny_backbone: Making, temperature: float | None
) -> None:
    strategy = learnt(tiny_backbone(), 2, alignment_epochs=10, alignment_samples=32, temperature=temperature)
    strategy.means.normal_(generator=torch.Generator().manual_seed(1))
    strategy.covariances.copy_(0.1 * torch.eye(32))
    features, labels = strategy.drawn()
    before = (strategy.head(features).argmax(dim=1) == labels).float().mean()
    heads = copy.deepcopy(strategy.head)
    heads.parts.requires_grad_(True)
    heads.aligned = heads.parts
    strategy.align(heads)
    after = (heads(features).argmax(dim=1) == labels).float().mean()
    assert before < 0.6 and after > 0.95


def test_a_factor_of_all_logits_changes_nothing() -> None:
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    one, other = normalised(logits, [2, 4]), normalised(100 * logits, [2, 4])
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_drift_scales_the_weight_of_old_heads_by_their_age(tiny_backbone: Making) -> None:
    settings: dict[str, Any] = {"alignment_lr": 0.0, "alignment_epochs": 1, "alignment_samples": 2}
    strategy = learnt(tiny_backbone(), 3, drift=0.02, **settings)
    for age, (part, aligned) in enumerate(
        zip(strategy.head.parts[::-1], strategy.head.aligned[::-1], strict=True)
    ):
        expected = (1 + 0.02 * age) * part.get_parameter("weight")
        torch.testing.assert_close(aligned.get_parameter("weight"), expected)
        assert torch.equal(aligned.get_parameter("bias"), part.get_parameter("bias"))


def test_a_head_that_is_not_linear_is_refused(tiny_backbone: Making) -> None:
    class Cosine(Strategy):
        def __init__(self, backbone: Backbone, **kwargs: Any) -> None:
            super().__init__(backbone, **kwargs)
            self.head = GrowingCosine(backbone.feature_dim)

    class AlignedCosine(ClassifierAlignment, Cosine):
        pass

    with pytest.raises(ValueError, match="AlignedCosine has a GrowingCosine: set alignment to false"):
        AlignedCosine(tiny_backbone(), alignment=True)


def test_without_alignment_nothing_is_kept(tiny_backbone: Making) -> None:
    plain, off = Strategy(tiny_backbone()), Aligned(tiny_backbone())
    assert plain.state_dict().keys() == off.state_dict().keys()
    assert off.promises == plain.promises
