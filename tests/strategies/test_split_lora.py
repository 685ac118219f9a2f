from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.contracts.strategy import TrainingData
from cl_bench.data.experience import Batch, Experience
from cl_bench.measure.moments import second_moments
from cl_bench.network.backbones import Backbone
from strategies.split_lora import SplitLoRA

Walking = Callable[..., Any]
Making = Callable[..., Backbone]


def split_lora(backbone: Making, kind: type[SplitLoRA] = SplitLoRA, **settings: Any) -> SplitLoRA:
    how: dict[str, Any] = {
        "rank": 4,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=5e-5),
    }
    return kind(backbone(), **how | settings)


def leading(moment: Tensor, count: int) -> np.ndarray[Any, Any]:
    """Return the strongest directions of a second moment, by SciPy's SVD in double precision."""
    found: np.ndarray[Any, Any] = scipy.linalg.svd(moment.double().numpy())[0][:, :count]
    return found


def test_new_rows_lie_in_what_the_inputs_so_far_use_least(backbone: Making, walk: Walking) -> None:
    seen: list[tuple[Tensor, list[int]]] = []

    class Spied(SplitLoRA):
        def after_training(self, data: TrainingData) -> None:
            super().after_training(data)
            seen.append((self.moments.clone(), self.memory.dims))

    learnt = walk(split_lora(backbone, Spied, alpha=2.0)).learnt
    assert all(dims > 0 for _, held in seen for dims in held)
    for (moments, held), its in zip(seen, learnt[1:], strict=False):
        for projection, (down, dims) in enumerate(zip(its.down, held, strict=True)):
            protected = leading(moments[projection // 2], dims)
            assert np.linalg.norm(down.numpy() @ protected) < 1e-5 * np.linalg.norm(down.numpy())


def test_rows_are_never_trained_and_shrink_with_the_experiences(backbone: Making, walk: Walking) -> None:
    fresh: list[list[float]] = []

    class Spied(SplitLoRA):
        def before_training(self, data: TrainingData) -> None:
            fresh.append([float(adapter.A.norm()) for _, adapter in self.adapters()])
            super().before_training(data)

    for index, (its, lengths) in enumerate(zip(walk(split_lora(backbone, Spied)).learnt, fresh, strict=True)):
        assert all(map(torch.equal, its.down, its.down_at_end))
        assert [float(down.norm()) * (index + 1) for down in its.down] == pytest.approx(lengths, rel=1e-5)


def test_the_running_moments_are_those_of_all_tokens_together(backbone: Making, walk: Walking) -> None:
    """Three experiences of different numbers of tokens; the network changes, so each is seen as it was."""
    sums, tokens = torch.zeros(2, 32, 32, dtype=torch.float64), 0

    class Spied(SplitLoRA):
        def after_training(self, data: TrainingData) -> None:
            nonlocal sums, tokens
            one = Part(data, 2 * self.experience.index + 1)
            number = 17 * sum(len(labels) for _, labels in one.batches)
            sums = sums + number * second_moments(self.features, self.layers, one.batches)
            tokens += number
            super().after_training(one)

    class Part:
        """The first batches of the plain images."""

        def __init__(self, data: TrainingData, count: int) -> None:
            self.batches: list[Batch] = list(data.plain())[:count]

        def augmented(self) -> list[Batch]:
            return self.batches

        plain = augmented

    strategy = split_lora(backbone, Spied)
    walk(strategy, max_epochs=1, batch_size=4)
    assert int(strategy.tokens) == tokens
    torch.testing.assert_close(strategy.moments.double(), sums / tokens, rtol=1e-5, atol=1e-7)


def split(backbone: Making, spectrum: Tensor, learnt: int, alpha: float) -> int:
    strategy = split_lora(backbone, alpha=alpha)
    for index in range(learnt):
        strategy.expand(Experience(index, 99, range(index, index + 1)))
    (found,) = strategy.split((spectrum / spectrum.sum())[None], [0])
    return found


@pytest.mark.parametrize("learnt", (1, 2, 5, 9))
@pytest.mark.parametrize("alpha", (0.5, 2.0, 20.0))
def test_the_split_is_the_minimum_of_the_papers_objective(
    backbone: Making, learnt: int, alpha: float
) -> None:
    """Counted from the weak end, over k free directions, as the paper writes it."""
    spectrum = 1 / torch.arange(1, 33, dtype=torch.float64) ** 2
    share = (spectrum / spectrum.sum()).tolist()
    costs = {k: learnt * sum(share[32 - k :]) - alpha * k / 32 for k in range(4, 32)}
    assert split(backbone, spectrum, learnt, alpha) == 32 - min(costs, key=lambda k: costs[k])


def test_more_experiences_leave_no_more_directions_free(backbone: Making) -> None:
    spectrum = torch.exp(-torch.arange(32, dtype=torch.float64) / 6)
    taken = [split(backbone, spectrum, learnt, alpha=2.0) for learnt in (1, 2, 4, 8, 16)]
    assert taken == sorted(taken)
    assert taken[0] < taken[-1]
    assert split(backbone, spectrum, 4, alpha=1e9) == 1
    assert split(backbone, spectrum, 4, alpha=0.0) == 32 - 4  # as many free directions as the rank


def test_the_published_spectra_protect_as_many_directions_as_computed_by_hand() -> None:
    """Of width 768, after 1, 2, 5, 9 and 19 experiences at α = 20."""
    strategy = SplitLoRA(
        Backbone(
            "vision_transformer", "random", {"img_size": 8, "patch_size": 4, "embed_dim": 768, "depth": 1}
        )
    )
    places = torch.arange(1, 769, dtype=torch.float64)
    for spectrum, expected in (
        (1 / places, [5, 10, 26, 47, 101]),
        (torch.exp(-places / 30), [7, 28, 56, 73, 96]),
    ):
        shares, found = (spectrum / spectrum.sum())[None], []
        for learnt in (1, 2, 5, 9, 19):
            strategy._experience = Experience(learnt - 1, 20, range(1))
            found += strategy.split(shares, [0])
        assert found == expected


def test_training_divides_logits_by_the_temperature_and_testing_does_not(backbone: Making) -> None:
    strategy = split_lora(backbone, temperature=7.0)
    strategy.expand(Experience(0, 2, range(2)))
    strategy.expand(Experience(1, 2, range(2, 4)))
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features, labels = strategy.features(images), torch.tensor([2, 3, 3, 2])
    logits = strategy.head(features)
    expected = F.cross_entropy(logits[:, 2:] / 7, labels - 2)
    torch.testing.assert_close(strategy.loss(features, labels), expected)
    assert torch.equal(strategy(images), logits)
