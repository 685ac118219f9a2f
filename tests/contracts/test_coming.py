"""The contract serves the methods to come: each strategy in coming.py keeps every claim."""

from pathlib import Path
from typing import Any

import pytest

from cl_bench.check.command import layer, verdicts
from cl_bench.check.subject import Subject
from cl_bench.run.run import quiet

COMING = Path(__file__).with_name("coming.py")
STRATEGIES = ("PrefixPool", "GrowingGates", "TextHead")
ADAM = "--model.optimizer=torch.optim.Adam"


def coming(name: str, *overrides: str) -> Subject:
    return Subject(layer(f"{COMING}:{name}"), overrides)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_coming_strategy_keeps_every_claim(name: str) -> None:
    with quiet():
        found = list(verdicts(coming(name)))
    assert {verdict.claim: verdict.why for verdict in found if not verdict.passed} == {}


def test_the_optimizer_of_the_stream_starts_every_experience_at_its_full_rate() -> None:
    annealed = "--model.scheduler=torch.optim.lr_scheduler.CosineAnnealingLR"
    words = (ADAM, "--model.optimizer.lr=0.01", annealed, "--model.scheduler.T_max=2")
    run = coming("PrefixPool", *words).run()
    rates = []
    for experience in run.experiences[:2]:
        run.strategy.expand(experience)
        configured: Any = run.strategy.configure_optimizers()
        (optimizer,), (schedule,) = configured
        rates.append([group["lr"] for group in optimizer.param_groups])
        for _ in range(2):
            optimizer.step()
            schedule.step()
        assert all(group["lr"] < 1e-6 for group in optimizer.param_groups)
    assert rates == [[0.01, 0.01], [0.01, 0.01, 0.01]]
