from __future__ import annotations

import json
import re
from argparse import ArgumentParser
from collections.abc import Iterator
from itertools import count

import pytest
import torch
from torch import nn

from cl_bench.bench import command
from cl_bench.bench.command import Bench, Row, add_shares, bench, ratios, turns, watched
from cl_bench.bench.options import add_arguments

KEYS = [
    *("name", "strategy", "experience", "precision", "batch", "median_s", "images_per_s", "of_matrix_rate"),
    *("ratio_to_floor", "ratio_low", "ratio_high", "peak_to_floor", "rest_to_floor"),
    *("peak_bytes", "kept_bytes", "master_bytes"),
]
MEGA = 250_000  # floats in a megabyte
DEPTH, WIDTH, TOKENS, RANK, CLASSES = 2, 64, 17, 10, 2

# Seconds that each call is said to take, whatever the batch.
SECONDS = {
    "32-true": {"floor": 2.0, "step": 2.2, "forward": 0.8, "second moments": 4 * 0.88, "loading": 0.5}
    | {"product": 1.0},
    "bf16-mixed": {"floor": 0.8, "step": 1.0, "forward": 0.4, "second moments": 4 * 0.6, "loading": 0.5}
    | {"fp32 floor": 2.0, "product": 0.5},
}
SIDE = 256  # of the matrices in a product
LATE = 1.05  # times as long does a late step take


def told(seconds: dict[str, list[float]], rounds: int) -> Iterator[str]:
    """Yield every name once, and make up its times; the machine is ten times as slow in the last round."""
    precision, late = "bf16-mixed" if "fp32 floor" in seconds else "32-true", "forward" not in seconds
    for name in seconds:
        yield name
        second = SECONDS[precision][name] * (LATE if late and name == "step" else 1)
        seconds[name] += [second, second, 10 * second]


@pytest.fixture(scope="module")
def found() -> Bench:
    parser = ArgumentParser()
    add_arguments(parser)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_SMALL", {"model": "vision_transformer", "options": options})
        patch.setattr(command, "_SIDE", {"cpu": SIDE})
        patch.setattr(command, "turns", told)
        words = ["--backbone", "small", "--batch", "8", "4", "--strategy", "inflora", "lora"]
        return bench(parser.parse_args(words))


def rows(found: Bench, *names: str, precision: str = "32-true", strategy: str = "inflora") -> list[Row]:
    own = (row for row in found.rows if (row["precision"], row["strategy"]) == (precision, strategy))
    return [row for row in own if row["name"] in names]


def test_json_holds_the_columns_of_the_table_and_nothing_else(found: Bench) -> None:
    content = json.loads(found.json())
    assert list(content) == ["rows", "device", "matrix_tflops"]
    assert content["device"].startswith("cpu") and content["matrix_tflops"] > 0
    assert all(list(row) == KEYS for row in content["rows"])
    assert found.text().splitlines()[2].split() == KEYS


@pytest.mark.parametrize(("precision", "ratio"), [("32-true", 1.1), ("bf16-mixed", 1.25)])
def test_steps_are_compared_with_the_floor_of_their_precision(
    found: Bench, precision: str, ratio: float
) -> None:
    steps = rows(found, "floor", "step", precision=precision)
    places = [(row["name"], row["experience"], row["batch"]) for row in steps]
    assert places == [(name, *at) for at in ((2, 4), (2, 8), (20, 4)) for name in ("floor", "step")]
    wanted = [1, ratio, 1, ratio, 1, LATE * ratio]
    assert [row["ratio_to_floor"] for row in steps] == pytest.approx(wanted)


def test_the_operations_of_a_step_are_those_of_all_its_products(found: Bench) -> None:
    def operations(batch: int) -> int:
        patches = batch * (TOKENS - 1) * 3 * 8 * 8 * WIDTH
        tokens, factors = batch * TOKENS, 2 * RANK  # of keys and values together
        mlp_and_projection = tokens * (4 + 4 + 1) * WIDTH**2
        qkv, down, up = tokens * 3 * WIDTH**2, tokens * WIDTH * factors, tokens * factors * 3 * WIDTH
        attention, head = 2 * batch * TOKENS**2 * WIDTH, batch * WIDTH * CLASSES
        forward = patches + DEPTH * (mlp_and_projection + qkv + down + up + attention) + head
        # To inputs and to both factors: nothing before the first adapter needs a gradient.
        backward = DEPTH * (mlp_and_projection + 2 * attention + up + up + down) + (qkv + down) + 2 * head
        return 2 * (forward + backward)

    for precision in SECONDS:
        steps = rows(found, "step", precision=precision, strategy="lora")
        rate = found.matrix_rates[precision]
        assert [row["of_matrix_rate"] * row["median_s"] * rate for row in steps] == pytest.approx(
            [operations(4), operations(8), operations(4)]
        )


def test_the_matrix_rate_is_the_best_of_the_products_between_the_steps(found: Bench) -> None:
    for precision, rate in found.matrix_rates.items():
        assert rate == 2 * SIDE**3 / SECONDS[precision]["product"]
        products = rows(found, "product", precision=precision)
        assert [row["of_matrix_rate"] for row in products] == [1.0] * 3


@pytest.mark.parametrize("product", ([0.1, 0.3, 0.2], [40.0, 30.0, 50.0]))
def test_no_step_passes_the_matrix_rate_even_if_every_product_was_slowed(product: list[float]) -> None:
    steps: list[Row] = [
        {"precision": "32-true", "operations": 5.0, "times": times, "median_s": sorted(times)[1]}
        for times in ([1.0, 9.0, 2.0], [3.0, 2.0, 4.0])
    ]
    slowed: Row = {
        "precision": "32-true",
        "operations": 5.0,
        "times": product,
        "median_s": sorted(product)[1],
    }
    rates = add_shares([*steps, slowed, {"precision": "32-true", "times": [0.1]}])
    assert rates == {"32-true": 5.0 / min(1.0, *product)}
    assert all(0 < row["of_matrix_rate"] <= 1 for row in [*steps, slowed])


def test_the_peak_is_close_to_that_of_the_floor_and_grows_by_what_a_batch_needs(found: Bench) -> None:
    for name in ("floor", "step"):
        small, large, _ = (row["peak_bytes"] for row in rows(found, name))
        # What every backward pass needs of an image: inputs of both norms, of attention and of GELU.
        needed = 4 * TOKENS * DEPTH * (2 + 3 + 4) * WIDTH
        assert 4 * needed < large - small < 3 * 4 * needed
    small, large, _ = (row["peak_to_floor"] for row in rows(found, "step"))
    assert large == pytest.approx(1.0, abs=0.05)
    assert small == rows(found, "step")[0]["peak_bytes"] / rows(found, "floor")[0]["peak_bytes"]


def test_the_rest_of_a_peak_is_without_what_the_floor_does_without(found: Bench) -> None:
    step, floor = (rows(found, name, precision="bf16-mixed")[-1] for name in ("step", "floor"))
    patch = 3 * 8 * 8
    assert step["master_bytes"] == 4 * ((patch + 1) * WIDTH + DEPTH * (12 * WIDTH**2 + 9 * WIDTH))
    assert rows(found, "step")[-1]["master_bytes"] == 0
    heads = 4 * 20 * CLASSES * (WIDTH + 1)
    assert heads < step["kept_bytes"] <= heads + 4 * DEPTH * WIDTH**2  # and a basis
    own = step["kept_bytes"] + step["master_bytes"]
    assert step["peak_to_floor"] - step["rest_to_floor"] == pytest.approx(own / floor["peak_bytes"])
    early, late = rows(found, "step")[0], rows(found, "step")[-1]
    assert late["peak_to_floor"] > 1.01 * early["peak_to_floor"]  # heads of twenty experiences, and a basis
    assert late["rest_to_floor"] == pytest.approx(early["rest_to_floor"], abs=0.002)


def test_what_happens_once_an_experience_has_rows_of_its_own(found: Bench) -> None:
    names = ("passes", "work", "evaluation", "checkpoint", "overhead")
    own = rows(found, *names)
    assert [(row["name"], row["experience"]) for row in own] == [
        (name, at) for at in (2, 20) for name in names
    ]
    assert [row["batch"] for row in own] == [8, 0, 32, 0, 0, 8, 0, 40, 0, 0]


def test_findings_compare_experiences_precisions_and_passes(found: Bench) -> None:
    text = found.text()
    for sentence in (
        "inflora, 32-true, batch 4: a step in experience 20 over one in 2: 1.050 [1.050, 1.050]",
        "inflora, batch 8: a step in fp32 over one in bf16: 2.200 [2.200, 2.200]",
        "32-true, batch 8: a second-moment pass over a forward pass: 1.100 [1.100, 1.100]",
        "bf16-mixed, batch 4: a second-moment pass over a forward pass: 1.500 [1.500, 1.500]",
    ):
        assert sentence in text


def test_an_experience_costs_its_steps_and_a_little_more(found: Bench) -> None:
    said = "inflora, 32-true: an experience of ImageNet-R, 2400 images and 50 epochs, takes"
    (minutes,) = map(float, re.findall(rf"{said} (\S+) min", found.text()))
    steps = 2_400 * 50 / 8 * 2.2 / 60
    assert steps < minutes < 1.05 * steps


def test_every_call_is_made_once_a_round_and_once_to_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, slow = [0.0], count(1)
    monkeypatch.setattr(command, "timer", lambda: clock[0])
    seconds: dict[str, list[float]] = {"a": [], "b": [], "c": []}
    made = []
    for name in turns(seconds, rounds=4):
        made.append(name)
        clock[0] += {"a": 3.0, "b": 2.0, "c": 1.0}[name] * (10 if next(slow) > 12 else 1)
    assert all(sorted(made[start : start + 3]) == list("abc") for start in range(0, 15, 3))
    assert len({tuple(made[start : start + 3]) for start in range(0, 15, 3)}) > 1
    assert seconds["c"] == [1.0, 1.0, 1.0, 10.0]
    # What slows the machine for a round leaves the ratio as it is.
    assert ratios(seconds["a"], seconds["b"]) == pytest.approx([1.5] * 4)


def test_the_peak_counts_what_is_alive_at_one_time() -> None:
    model = nn.Linear(MEGA, 1, bias=False)
    with watched(model, torch.optim.Adam(model.parameters())) as peak:
        first = torch.ones(2 * MEGA)
        second = first + 1
        del first
        third = torch.ones(MEGA)
        del second, third
    assert 5e6 <= peak[0] < 5.01e6
