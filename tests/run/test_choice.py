from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cl_bench.results.result import digest
from cl_bench.run.choice import choice
from cl_bench.run.configuration import Configuration, layers, resolve

RECORD = {
    "strategy": "lora",
    "dataset": "imagenet_r",
    "space": {"rank": {"low": 2, "high": 16}, "head_lr": {"low": 1e-3, "high": 1e-1}},
    "budget": {"trials": 2},
    "on": "first:3",
    "metric": "maa/sample",
    "val_fraction": 0.2,
    "seed": 0,
    "order": "identity",
    "fixed": [],
    "settings": {"rank": [4, 8], "head_lr": [0.01, 0.03]},
    "scores": [50.0, 60.0],
    "experiences": [3, 3],
    "spent": {"trials": 2},
    "best": 1,
}


def cell(dataset: str, *words: str) -> Configuration:
    root = ["--root=/data"] if dataset == "imagenet_r" else []
    return resolve(layers("lora", dataset), [*root, *words])


@pytest.fixture
def tuned(tmp_path: Path) -> str:
    (tmp_path / "record.json").write_text(json.dumps(RECORD))
    return f"--tuned={tmp_path}/record.json"


def test_only_settings_of_config_recipe_and_class_are_published() -> None:
    def settings(dataset: str, *words: str) -> Any:
        return choice(cell(dataset, *words))["settings"]

    assert settings("imagenet_r") == "published"
    assert settings("imagenet_r", "--seed=3", "--num_experiences=20", "--test_batch_size=16") == "published"
    for word in (
        "--rank=4",
        "--batch_size=16",
        "--max_epochs=1",
        "--optimizer.weight_decay=0.1",
        "--scheduler=null",
    ):
        assert settings("imagenet_r", word) == "by hand"
    assert settings("characters") == "by hand"  # its config sets the rates of every method


def test_a_run_starts_from_the_best_trial_and_names_its_study(tuned: str) -> None:
    run = cell("imagenet_r", tuned)
    assert (run.namespace.model.rank, run.namespace.model.head_lr) == (8, 0.03)
    assert choice(run)["settings"] == "tuned"
    assert choice(run)["tuning"]["scores"] == [50.0, 60.0]
    assert run.cell["tuning"] == {
        "budget": {"trials": 2.0},
        "on": "first:3",
        "metric": "maa/sample",
        "space": digest(RECORD["space"]),
    }
    by_hand = cell("imagenet_r", "--rank=8", "--head_lr=0.03")
    assert {**run.cell, "tuning": None} == {**by_hand.cell, "tuning": None}
    assert run.hash != by_hand.hash


def test_the_best_settings_of_another_dataset_are_a_choice_by_hand(tuned: str) -> None:
    assert choice(cell("characters", tuned))["settings"] == "by hand"


def test_options_after_a_record_replace_it_and_those_before_give_way(tuned: str) -> None:
    before, after = cell("imagenet_r", "--rank=2", tuned), cell("imagenet_r", tuned, "--rank=2")
    assert (before.namespace.model.rank, after.namespace.model.rank) == (8, 2)
    assert choice(before)["settings"] == "tuned"
    assert choice(after)["settings"] == "by hand"
    assert before.varied("5", "identity").cell["tuning"] == before.cell["tuning"]


def test_a_file_that_names_a_record_without_its_settings_is_refused(tuned: str, tmp_path: Path) -> None:
    record = tuned.removeprefix("--tuned=")
    saved, bare = tmp_path / "saved.yaml", tmp_path / "bare.yaml"
    run = cell("imagenet_r", tuned, "--head_lr=0.5")
    saved.write_text(run.yaml)
    assert resolve([saved]).cell == run.cell
    saved.write_text(cell("imagenet_r", tuned).yaml)
    assert choice(resolve([saved]))["settings"] == "tuned"
    bare.write_text(f"tuned: {record}")
    with pytest.raises(
        ValueError, match=rf"tuned in .*bare.yaml does not set rank: give --tuned={record} on"
    ):
        resolve([*layers("lora", "imagenet_r"), bare])
