"""The contract serves the methods to come: each strategy in coming.py learns and keeps every claim."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from cl_bench.check.claims import verdicts
from cl_bench.check.command import layer
from cl_bench.check.subject import Run, Subject
from cl_bench.run.run import quiet

COMING = Path(__file__).with_name("coming.py")
STRATEGIES = ("PrefixPool", "PromptTokens", "GrowingGates", "RandomRidge", "TextHead", "MinorSubspace")


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_coming_strategy_keeps_every_claim(name: str) -> None:
    with quiet():
        found = list(verdicts(Subject(layer(f"{COMING}:{name}"))))
    assert {verdict.claim: verdict.why for verdict in found if not verdict.passed} == {}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_coming_strategy_learns_what_a_frozen_backbone_does_not_know(name: str) -> None:
    run = learnt(name, epochs=30)
    first = run.experiences[0]
    chosen = sorted(run.stream.training_images(first))
    images = run.stream.test_transform()(run.stream.train.images[chosen])
    labels = torch.tensor([run.stream.train.targets[index] for index in chosen])
    predictions = run.logits(images).argmax(dim=1)
    assert (predictions == labels).float().mean() > 0.9


def test_every_experience_starts_at_the_full_rate_of_the_optimizer_of_the_stream() -> None:
    with quiet():
        run = Subject(layer(f"{COMING}:PrefixPool")).run()
        run.strategy._scheduler = partial(CosineAnnealingLR, T_max=2)
        for experience in run.experiences[:2]:
            run.learn(experience)
    ...


def learnt(name: str, epochs: int) -> Run:
    with quiet():
        run = Subject(layer(f"{COMING}:{name}")).run({"trainer.max_epochs": epochs})
        run.learn(run.experiences[0])
    return run
