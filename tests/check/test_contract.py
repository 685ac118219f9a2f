from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cl_bench.check.command import CLAIMS
from cl_bench.run.configs import CONFIGS, load

Checked = Callable[..., Any]

CONFIG_FILES = sorted(CONFIGS.glob("strategies/*.yaml"))
LEARNT, START, FROZEN, HEADS, MERGE, OPTIMIZER, TASK, DATA, *_ = CLAIMS


FIRST = {load(file)["model"]["class_path"]: file for file in sorted(CONFIG_FILES, key=lambda f: -len(f.stem))}
"""The config of each class; of several, the one with the shortest name."""

VARIANTS = [file for file in CONFIG_FILES if file not in FIRST.values()]


@pytest.mark.parametrize(
    "config",
    [*sorted(FIRST.values()), *(pytest.param(file, marks=pytest.mark.soak) for file in VARIANTS)],
    ids=lambda path: path.stem,
)
def test_every_strategy_keeps_its_contract(checked: Checked, config: Path) -> None:
    assert checked(config.stem).broken == {}


@pytest.mark.parametrize("config", VARIANTS, ids=lambda path: path.stem)
def test_another_config_of_a_class_learns_and_sees_only_its_own_data(checked: Checked, config: Path) -> None:
    claims = (LEARNT, START, FROZEN, HEADS, MERGE, OPTIMIZER, TASK, DATA)
    assert checked(config.stem, claims=claims).broken == {}


@pytest.mark.soak
@pytest.mark.parametrize(
    ("stem", "overrides"),
    (
        ("janus_lora", ("--row_space=free",)),
        ("janus_lora", ("--online_estimation=stream",)),
        ("janus_lora", ("--online_estimation=null", "--rectification=false", "--decoupled_margin=false")),
        ("lora_gpm", ("--decoupled_margin=true", "--row_space=safe")),
        ("inflora", ("--energy=features", "--memory_form=plain")),
        ("keeplora", ("--principal=output", "--input_statistic=batch_average", "--head_start=random")),
        ("loda", ("--gradient_alignment=false", "--recalibration=none")),
        ("loda", ("--recalibration=full", "--count_merged=false")),
        ("lora", ("--variant=shared", "--head_start=means")),
    ),
)
def test_every_option_keeps_the_contract(checked: Checked, stem: str, overrides: tuple[str, ...]) -> None:
    assert checked(stem, *overrides).broken == {}
