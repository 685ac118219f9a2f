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
