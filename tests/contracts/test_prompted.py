from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cl_bench.check.command import layer
from cl_bench.check.data import prediction
from cl_bench.check.subject import Broken, Subject
from cl_bench.contracts.prompted import PromptedStrategy
from cl_bench.network.backbones import Backbone
from cl_bench.network.prompts import Prompts
from cl_bench.run.run import quiet
from strategies.l2p import L2P


class Offset(PromptedStrategy):
    """One prompt token: the query itself."""

    def prompts(self, query: Tensor) -> tuple[Prompts, Tensor | None]:
        return Prompts(query[:, None]), query[:, :2]


def test_the_query_is_the_frozen_feature_and_has_no_gradient(
    tiny_backbone: Callable[..., Backbone],
) -> None:
    strategy, images = Offset(tiny_backbone()), torch.rand(3, 3, 8, 8)
    found = strategy.query(images)
    assert torch.equal(found, strategy.backbone(images)) and not found.requires_grad


def test_prompts_are_made_from_whatever_query_returns(tiny_backbone: Callable[..., Backbone]) -> None:
    class Looked(Offset):
        def query(self, images: Tensor) -> Tensor:
            return torch.full((len(images), 32), 0.5)

    strategy, images = Looked(tiny_backbone()), torch.rand(3, 3, 8, 8)
    found = strategy.features(images)
    expected = strategy.backbone(images, Prompts(torch.full((1, 32), 0.5)))
    assert torch.equal(found.pooled, expected)
    assert found.extra.tolist() == [[0.5, 0.5]] * 3


def test_a_method_without_prompts_of_its_own_is_not_finished(
    tiny_backbone: Callable[..., Backbone],
) -> None:
    with pytest.raises(NotImplementedError):
        PromptedStrategy(tiny_backbone()).features(torch.rand(1, 3, 8, 8))


class Voting(L2P):
    """Lets a batch vote for the prompts of all of its images, as the released codes do."""

    def prompts(self, query: Tensor) -> tuple[Prompts, Tensor]:
        similarity = query @ self.keys.T
        votes = torch.zeros_like(similarity).scatter_(1, similarity.topk(self.chosen).indices, 1.0).sum(dim=0)
        chosen = votes.topk(self.chosen).indices
        tokens = self.pool[chosen].flatten(0, 1).expand(len(query), -1, -1)
        return Prompts(tokens), similarity[:, chosen]


@pytest.mark.parametrize(
    "words",
    (
        (f"{__file__}:Voting", "--chosen=2", "--pull=0"),
        ("strategies.dualprompt.DualPrompt", "--ported_reshape=true"),
    ),
    ids=["batch vote", "ported reshape"],
)
def test_the_check_finds_prompts_that_depend_on_the_batch(words: tuple[str, ...]) -> None:
    rate = "--model.optimizer.lr=0.1"  # so that experiences have prompts of their own
    with quiet():
        run = Subject(layer(words[0]), [*words[1:], "--model.optimizer=torch.optim.Adam", rate]).run()
        for experience in run.experiences:
            run.learn(experience)
    with pytest.raises(Broken, match=r"an image gets other logits .* than among all images"):
        prediction(run)
