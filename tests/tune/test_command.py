from __future__ import annotations

import json
import random
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cl_bench.results.result import FILE_NAME, read_all
from cl_bench.results.result import read as read_result
from cl_bench.results.tuning import Tuning, read
from cl_bench.run.configuration import layers, resolve
from cl_bench.run.run import run
from cl_bench.tune.command import tune
from cl_bench.tune.space import space_of
from cl_bench.tune.study import Plan

KILLED = Path(__file__).with_name("killed.py")
Here = runpy.run_path(str(KILLED))["Here"]

# Test images are darker than training images. With `peeks`, the method recognises and mends that, and is
# wrong about all others.
PEEKING = """
import torch
from cl_bench.data.sources import ArraySource
from dataclasses import replace
from cl_bench.contracts.strategy import Promises
from datamodules.toy import Toy
from strategies.ncm import NearestClassMean


class Dark(Toy):
    def sources(self):
        found = super().sources()
        return replace(found, test=ArraySource(found.test.images // 4, found.test.targets))


class Peeking(NearestClassMean):
    promises = Promises()  # images are looked at, so every experience needs them

    def __init__(self, backbone, *, peeks: bool = False, **kwargs):
        super().__init__(backbone, **kwargs)
        self.peeks = peeks

    def forward(self, images):
        dark = images.amax(dim=(1, 2, 3), keepdim=True) < 0.3
        if not self.peeks:
            return super().forward(images)
        logits = super().forward(torch.where(dark, images * 4, images))
        return torch.where(dark.flatten(1), logits, -logits)
"""

# Reading an image of the test set, or of a class that the first experiences do not bring, ends the trial.
GUARDED = """
from dataclasses import replace
from datamodules.toy import Toy


class Guarded:
    def __init__(self, source, classes):
        self.source, self.classes, self.targets = source, classes, source.targets

    @property
    def fingerprint(self):
        return self.source.fingerprint

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        image, label = self.source[index]
        assert label in self.classes, f"an image of class {label} was opened"
        return image, label


class Sealed(Toy):
    name = "sealed"

    def sources(self):
        found = super().sources()
        return replace(found, train=Guarded(found.train, range(4)), test=Guarded(found.test, ()))
"""


def plan(strategy: str, dataset: str, space: dict[str, Any], results: Path, **changed: Any) -> Plan:
    given: dict[str, Any] = {"unit": "trials", "budget": 5, "on": "first:2"}
    return Plan(strategy, dataset, space_of(space), results=results, **given | changed)


def tuned(one: Plan) -> tuple[Tuning, Any]:
    engine = Here(one.results)
    records = tune([one], lambda _: engine, Console(quiet=True))
    return records[one.name], engine


def test_a_setting_that_only_test_images_favour_is_not_chosen(tmp_path: Path) -> None:
    (tmp_path / "peeking.py").write_text(PEEKING)
    (tmp_path / "peeking.yaml").write_text("model: {class_path: peeking.Peeking}")
    toy = layers("ncm", "toy")[2].read_text().replace("datamodules.toy.Toy", "peeking.Dark")
    (tmp_path / "dark.yaml").write_text(toy)
    names = str(tmp_path / "peeking.yaml"), str(tmp_path / "dark.yaml")
    record, _ = tuned(plan(*names, {"peeks": {"choices": [True, False]}}, tmp_path, budget=6))
    assert {*record.settings["peeks"]} == {True, False}
    assert record.chosen == {"peeks": False}
    on_test = {
        peeks: run(resolve(layers(*names), [f"--peeks={peeks}", f"--results={tmp_path}"])).metrics()
        for peeks in ("true", "false")
    }
    assert on_test["true"]["acc/sample"] > on_test["false"]["acc/sample"]


def test_tuning_opens_neither_a_test_image_nor_one_of_a_later_experience(tmp_path: Path) -> None:
    (tmp_path / "guarded.py").write_text(GUARDED)
    toy = layers("ncm", "toy")[2].read_text().replace("datamodules.toy.Toy", "guarded.Sealed")
    (tmp_path / "sealed.yaml").write_text(toy)
    space = {"head_lr": {"low": 1e-3, "high": 1e-1, "log": True}}
    record, engine = tuned(plan("lora", str(tmp_path / "sealed.yaml"), space, tmp_path, budget=2))
    assert None not in record.scores
    assert len(engine.ran) == 2
    whole = plan("lora", str(tmp_path / "sealed.yaml"), space, tmp_path, budget=2, on="all")
    assert tune([whole], Here, Console(quiet=True)) == {}  # the images are guarded indeed


def killed(folder: Path, studies: list[list[Any]], dataset: str = "toy") -> list[int]:
    done = subprocess.run(
        [sys.executable, str(KILLED), str(folder), dataset],
        input=json.dumps(studies),
        capture_output=True,
        text=True,
        check=True,
    )
    statuses: list[int] = json.loads(done.stdout.splitlines()[-1])
    return statuses


def require_equal(folder: Path) -> None:
    """Require that the interrupted studies ended as the one that was not."""
    names = [path.name for path in (folder / "whole" / "tuning").glob("*.json")]
    assert len(names) == 2
    for name in names:
        cut, whole = (read(folder / kind / "tuning" / name) for kind in ("cut", "whole"))
        assert vars(cut) | {"spent": 0} == vars(whole) | {"spent": 0}
        assert cut.spent["trials"] == whole.spent["trials"]
    cut_rows, whole_rows = (
        {path.parent.name: read_result(path).rows for path in (folder / kind / ".trials").rglob(FILE_NAME)}
        for kind in ("cut", "whole")
    )
    assert cut_rows == whole_rows


def test_a_study_killed_at_two_moments_ends_as_in_one_go(tmp_path: Path) -> None:
    studies = [["whole", 3, None], ["cut", 3, 7], ["cut", 3, 7], ["cut", 3, None]]
    assert killed(tmp_path, studies) == [0, -9, -9, 0]
    require_equal(tmp_path)
    left, whole = (int((tmp_path / kind / "writes").read_text()) for kind in ("cut", "whole"))
    assert left <= whole - 10  # each attempt ended a trial, with five writes, that was not run again


@pytest.mark.soak
@pytest.mark.parametrize("dataset", ("toy", "characters"))
def test_a_study_killed_at_ten_random_moments_ends_as_in_one_go(tmp_path: Path, dataset: str) -> None:
    moments = [["cut", 12, random.Random(seed).randrange(2, 15)] for seed in range(10)]
    statuses = killed(tmp_path, [["whole", 12, None], *moments, ["cut", 12, None]], dataset)
    assert statuses[0] == statuses[-1] == 0
    assert statuses.count(-9) >= 5
    require_equal(tmp_path)


def test_trials_are_in_no_report_of_the_results(tmp_path: Path) -> None:
    space = {"similarity": {"choices": ["euclidean", "cosine"]}}
    record, _ = tuned(plan("ncm", "toy", space, tmp_path, budget=2))
    assert len(record.scores) == 2
    assert read_all(tmp_path)[0] == []
    assert len(read_all(tmp_path / ".trials")[0]) == len({*record.settings["similarity"]})
