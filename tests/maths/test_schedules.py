import importlib
import math

import pytest
import torch

from cl_bench.maths.schedules import DelayedQuarterCosine, QuarterCosine
from cl_bench.run.configs import CONFIGS, load


def rates(epochs: int, stepped: int, kind: type[QuarterCosine] = QuarterCosine) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    schedule = kind(optimizer, epochs)
    found = []
    for _ in range(stepped):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_rate_follows_the_formula_of_the_released_code() -> None:
    expected = [0.5 * math.cos(99 * math.pi * epoch / (200 * 19)) for epoch in range(20)]
    assert rates(20, 20) == pytest.approx(expected)
    assert rates(20, 20)[-1] == pytest.approx(0.5 * math.cos(0.495 * math.pi))


@pytest.mark.parametrize(
    ("epochs", "first", "last", "above"),
    (
        (20, (1, 1, 0.9967), (0.2583, 0.1784, 0.0974), 7.7),
        (50, (1, 1, 0.9995), (0.1107, 0.0791, 0.0474), 3.1),
    ),
)
def test_delayed_rates_are_those_that_the_released_class_of_inflora_prints(
    epochs: int, first: tuple[float, ...], last: tuple[float, ...], above: float
) -> None:
    found = [2 * rate for rate in rates(epochs, epochs, DelayedQuarterCosine)]
    assert found[:3] == pytest.approx(first, abs=5e-5)
    assert found[-3:] == pytest.approx(last, abs=5e-5)
    assert 100 * (sum(found) / (2 * sum(rates(epochs, epochs))) - 1) == pytest.approx(above, abs=0.05)


FOLLOWING_INFLORA = (
    "bilora",
    "gainlora",
    "inflora",
    "inflora_b5",
    "janus_lora",
    "lora",
    "lora_drs",
    "lora_drs_gr",
    "lora_gpm",
    "o_lora",
    "slao",
)


def test_every_recipe_that_follows_inflora_has_the_schedule_of_its_class() -> None:
    kinds = {
        recipe: load(recipe)["model"]["init_args"]["scheduler"]["class_path"].rpartition(".")[2]
        for stem in FOLLOWING_INFLORA
        for recipe in (CONFIGS / "recipes").glob(f"*/{stem}.yaml")
    }
    assert kinds.keys() >= {CONFIGS / "recipes" / "imagenet_r" / f"{stem}.yaml" for stem in FOLLOWING_INFLORA}
    for recipe, kind in kinds.items():
        expected = "DelayedQuarterCosine"
        if recipe.parent.name == "domainnet" and not recipe.stem.startswith("lora_drs"):
            expected = "CosineAnnealingLR" if recipe.stem == "bilora" else "MultiStepLR"
        assert kind == expected, recipe


def test_a_single_epoch_has_the_full_rate_and_epochs_past_the_end_the_last() -> None:
    assert rates(1, 1) == rates(1, 1, DelayedQuarterCosine) == [0.5]
    assert rates(3, 5)[2:] == pytest.approx([0.5 * math.cos(0.495 * math.pi)] * 3)


def test_a_training_of_another_length_is_refused() -> None:
    schedule = QuarterCosine(torch.optim.SGD([torch.zeros(1)], lr=0.5), epochs=20)
    schedule.require_length(20)
    with pytest.raises(ValueError, match=r"set --model\.scheduler\.epochs 5 as well"):
        schedule.require_length(5)


def test_a_schedule_over_zero_epochs_is_refused() -> None:
    with pytest.raises(ValueError, match="give at least one"):
        rates(0, 1)


class CosineScheduleAsReleased:
    """The schedule of CODA-Prompt's and InfLoRA's code, written and counted as there.

    Source: https://github.com/GT-RIPL/CODA-Prompt, ``learners`` and ``utils/schedulers.py``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, K: int) -> None:
        self.optimizer, self.K = optimizer, K
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.step(0)
        self.last_epoch = -1

    def step(self, epoch: int | None = None) -> None:
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate

    def get_lr(self) -> list[float]:
        if self.last_epoch == 0:
            return self.base_lrs
        share = math.cos((99 * math.pi * self.last_epoch) / (2 * 100 * (self.K - 1)))
        return [base * share for base in self.base_lrs]


@pytest.mark.parametrize("epochs", (5, 20, 50))
def test_delayed_rates_are_those_of_the_released_class_driven_as_it_is(epochs: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    schedule = CosineScheduleAsReleased(optimizer, epochs)
    released = []
    for epoch in range(epochs):
        if epoch > 0:  # as CODA-Prompt's learner; InfLoRA's steps at the end of each epoch
            schedule.step()
        released.append(optimizer.param_groups[0]["lr"])
    assert rates(epochs, epochs, DelayedQuarterCosine) == pytest.approx(released, rel=1e-12)


# The share of the full rate in the first, the second, the middle and the last epoch, of an
# experience, from the closed forms: (1 + cos(π e / E)) / 2 for cosine annealing, where PyTorch recurs.
PRINTED = {
    ("DelayedQuarterCosine", 5): (1, 1, 0.9254, 0.3935),
    ("DelayedQuarterCosine", 20): (1, 1, 0.7407, 0.0974),
    ("DelayedQuarterCosine", 50): (1, 1, 0.7237, 0.0474),
    ("CosineAnnealingLR", 5): (1, 0.9045, 0.6545, 0.0955),
    ("CosineAnnealingLR", 10): (1, 0.9755, 0.5, 0.0245),
    ("CosineAnnealingLR", 15): (1, 0.9891, 0.5523, 0.0109),
    ("CosineAnnealingLR", 20): (1, 0.9938, 0.5, 0.0062),
    ("CosineAnnealingLR", 30): (1, 0.9973, 0.5, 0.0027),
    ("CosineAnnealingLR", 50): (1, 0.9990, 0.5, 0.0010),
    ("MultiStepLR", 5): (1, 1, 1, 0.1),
    ("MultiStepLR", 10): (1, 1, 0.005, 1.25e-7),
    ("MultiStepLR", 100): (1, 1, 0.1, 0.01),
}
SCHEDULED = [
    recipe
    for recipe in sorted((CONFIGS / "recipes").glob("*/*.yaml"))
    if "scheduler" in load(recipe).get("model", {}).get("init_args", {})
]


def test_every_recipe_trains_at_the_printed_rates_from_its_first_epoch_to_its_last() -> None:
    seen = set()
    for recipe in SCHEDULED:
        config = load(recipe)
        named, epochs = config["model"]["init_args"]["scheduler"], config["trainer"]["max_epochs"]
        module, _, name = named["class_path"].rpartition(".")
        least = named["init_args"].get("eta_min", 0.0)
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.01)
        schedule = getattr(importlib.import_module(module), name)(optimizer, **named["init_args"])
        found = []
        for _ in range(epochs):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        shares = [(rate - least) / (0.01 - least) for rate in found]
        printed = PRINTED[name, epochs]
        some = shares[0], shares[1], shares[epochs // 2], shares[-1]
        assert some == pytest.approx(printed, abs=5e-5, rel=1e-6), recipe
        seen.add((name, epochs))
    assert seen == PRINTED.keys()
