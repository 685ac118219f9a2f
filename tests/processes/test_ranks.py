"""One run in two real processes against the same run in one; this file is also the command of the two."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from cl_bench import __main__ as cli
from cl_bench.artifacts import predictions
from cl_bench.contracts.strategy import Strategy
from cl_bench.data.loading import RankBatches
from cl_bench.loop.diagnostics import Diagnostics
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.maths.memory import GPM, DualGPM, reaching
from cl_bench.measure.moments import SecondMoments
from cl_bench.measure.sketch import InputSketch
from cl_bench.network.backbones import Backbone
from cl_bench.processes import distributed
from cl_bench.processes.ranks import _prints, agree, is_first, place, require_agreement
from cl_bench.results.result import FILE_NAME, read
from datamodules.toy import Toy
from strategies.ease import EASE
from strategies.ewc_lora import EWCLoRA
from strategies.gainlora import GainLoRA
from strategies.inflora import InfLoRA
from strategies.janus_lora import JanusLoRA
from strategies.keeplora import KeepLoRA
from strategies.loda import LoDA
from strategies.lora import LoRA
from strategies.lora_drs import LoRADRS
from strategies.lora_gpm import LoRAGPM
from strategies.ncm import NearestClassMean
from strategies.ranpac import RanPAC
from strategies.slca import SLCA
from strategies.tuna import TUNA


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


WATCHED = "LoRA with diagnostics"
STRATEGIES: dict[str, Callable[[Backbone], Strategy]] = {
    "LoRA": lambda backbone: LoRA(backbone, rank=2),
    "LoRA-GPM": lambda backbone: LoRAGPM(backbone, rank=2, threshold=0.8),
    "InfLoRA": lambda backbone: InfLoRA(backbone, rank=2, threshold=0.8),
    "KeepLoRA": lambda backbone: KeepLoRA(backbone, rank=2, feature_threshold=0.8),
    "KeepLoRA as released": lambda backbone: KeepLoRA(backbone, rank=2, input_statistic="batch_average"),
    "JANUS-LoRA": lambda backbone: JanusLoRA(backbone, rank=2, threshold=0.8),
    "JANUS-LoRA with triplets": lambda backbone: JanusLoRA(
        backbone, rank=2, threshold=0.8, estimate_every=3, margin_loss="triplet"
    ),
    "LoDA": lambda backbone: LoDA(backbone, rank=2),
    "NCM": NearestClassMean,
    "LoRA-DRS": lambda backbone: LoRADRS(backbone, rank=2),
    "EWC-LoRA": lambda backbone: EWCLoRA(backbone, rank=2),
    "RanPAC": lambda backbone: RanPAC(backbone, bottleneck=2, bottleneck_dropout=0.0, random_features=16),
    "EASE": lambda backbone: EASE(backbone, bottleneck=2, bottleneck_dropout=0.0),
    "SLCA++": lambda backbone: SLCA(backbone, rank=2, alignment_samples=8),
    "GainLoRA": lambda backbone: GainLoRA(backbone, rank=2, threshold=0.8, gate_width=8),
    "TUNA": lambda backbone: TUNA(
        backbone, bottleneck=2, bottleneck_dropout=0.0, alignment_epochs=2, alignment_samples=8
    ),
    WATCHED: lambda backbone: LoRA(backbone, rank=2, optimizer=sgd),
}
OFTEN = {WATCHED, "JANUS-LoRA", "KeepLoRA", "LoDA", "EWC-LoRA", "RanPAC", "SLCA++"}
"""One of each kind of what processes exchange; the long version of the tests runs all."""


def outcome(name: str, **arguments: Any) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
    """Return state, rows and diagnostics of a run; the last batch of every epoch is a single image."""
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    backbone = Backbone("vision_transformer", "random", options, "half")
    # Rounding must not grow into another decision, so all is done in double precision; diagnostics are not.
    how: dict[str, Any] = {"callbacks": [Diagnostics()]} if name == WATCHED else {"precision": "64-true"}
    trainer = StreamTrainer(max_epochs=2, accelerator="cpu", **how, **arguments)
    strategy = STRATEGIES[name](backbone)
    data = Toy(num_classes=8, held_out_classes=2, num_experiences=2, image_size=8, seed=1, batch_size=7)
    result = trainer.run(strategy, data)
    state = {name: value for name, value in strategy.state_dict().items() if isinstance(value, Tensor)}
    return state, result.rows, result.diagnostics


def diverse(rank: int) -> nn.Module:
    """A model whose memories differ between two processes: in width, in type, and in the form they store."""
    inputs = torch.randn(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments, first = inputs @ inputs.mT, rank == 0
    one, much, little = GPM(2, 6), DualGPM(2, 6), DualGPM(2, 6)
    one.update(moments if first else moments.float(), reaching(0.9 if first else 0.5))
    much.update(moments, reaching(0.999 if first else 0.3))
    little.update(moments, reaching(0.3 if first else 0.999))
    layer = nn.Linear(2, 1, dtype=torch.float64)
    return nn.ModuleDict({"layer": layer, "one": one, "much": much, "little": little})


def agreed(folder: Path) -> None:
    """Let two processes agree on such a model, and keep what each then holds."""
    rank, _ = place()
    model = diverse(rank)
    assert len(model.state_dict()) == len(diverse(1 - rank).state_dict())
    agree(model)
    require_agreement(model)
    torch.save(model.state_dict(), folder / f"agreed-{rank}.pt")


def main(folder: Path, *names: str) -> None:
    torch.set_num_threads(1)
    for name in names:
        found = outcome(name, devices=2, strategy="ddp", check_agreement=True)
        if is_first():
            torch.save(found, folder / f"{name}.pt")
    agreed(folder)


@pytest.fixture(scope="module")
def of_two(chosen: Callable[[str], set[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes found: with the strategies of the tests that were chosen."""
    folder = tmp_path_factory.mktemp("two")
    names = [name for name in STRATEGIES if name in chosen("name")]
    done = subprocess.run(
        [sys.executable, __file__, str(folder), *names],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.soak) for name in STRATEGIES]
)
def test_two_processes_learn_and_count_what_one_does(of_two: Path, name: str) -> None:
    state, rows, diagnostics = torch.load(of_two / f"{name}.pt", weights_only=False)
    expected, expected_rows, expected_diagnostics = outcome(name)
    assert rows == expected_rows
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        found = state[key]
        assert found.shape == tensor.shape, key
        if key.startswith("memory."):  # the signs of a basis are arbitrary
            found, tensor = found @ found.mT, tensor @ tensor.mT
        if key.endswith(".A"):  # as are those of directions that became rows
            found = found * (found * tensor).sum(dim=1, keepdim=True).sign()
        assert torch.allclose(found, tensor, rtol=0, atol=_rounding(name, key)), key
    assert len(diagnostics) == len(expected_diagnostics)
    for one, other in zip(diagnostics, expected_diagnostics, strict=True):
        assert one.keys() == other.keys()
        assert numbers(one) == pytest.approx(numbers(other), rel=1e-4, abs=1e-6)


def test_processes_agree_on_bases_of_any_width_type_and_form(of_two: Path) -> None:
    one, other = (torch.load(of_two / f"agreed-{rank}.pt", weights_only=True) for rank in range(2))
    assert one.keys() == other.keys() == diverse(0).state_dict().keys() != diverse(1).state_dict().keys()
    for name, tensor in diverse(0).state_dict().items():
        assert torch.equal(one[name], other[name]), name
        if not name.startswith("layer."):
            assert one[name].dtype == other[name].dtype == tensor.dtype, name
            assert torch.equal(one[name], tensor), name


def _rounding(name: str, key: str) -> float:
    if key.endswith("isolated.A"):  # directions with almost the same ratio of energies are interchangeable
        return 1e-3
    # Memories are kept in single precision, and so are the moments of online estimation.
    return 2e-6


def numbers(entry: Any) -> list[float]:
    """Every number of a diagnostic; lists of images are sorted, since processes change their order."""
    if isinstance(entry, dict):
        return [number for value in entry.values() for number in numbers(value)]
    if isinstance(entry, list):
        return sorted(number for value in entry for number in numbers(value))
    return [] if entry is None else [float(entry)]


def command(*words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    started = [*(launcher or (sys.executable,)), str(Path(sys.executable).with_name("cl-bench")), *words]
    return subprocess.run(started, capture_output=True, text=True, check=False, timeout=300)


def losses(result: Path) -> list[float]:
    with (result.parent / "curves" / "metrics.csv").open() as lines:
        return [float(line["train/loss_epoch"]) for line in csv.DictReader(lines) if line["train/loss_epoch"]]


@pytest.mark.soak
def test_fabric_run_is_one_run_of_the_same_cell(tmp_path: Path) -> None:
    words = ["run", "janus_lora", "toy", "--batch_size", "23", "--test_batch_size", "5", "--seed", "1"]
    words += ["--keep", "predictions", "--results"]
    fabric = (str(Path(sys.executable).with_name("fabric")), "run", "--devices", "2", "--accelerator", "cpu")
    done = command(*words, str(tmp_path / "two"), launcher=fabric)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accuracy over") == 3
    assert cli.main([*words, str(tmp_path / "one")]) == 0
    (two,), (one,) = ([*(tmp_path / name).rglob(FILE_NAME)] for name in ("two", "one"))
    assert two.parent.name == one.parent.name
    assert read(two).rows == read(one).rows
    assert [read(file).provenance["processes"] for file in (two, one)] == [2, 1]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    of_two, of_one = (predictions.read(file.parent) for file in (two, one))
    assert not of_two.duplicated(["after", "sample"]).any()
    pd.testing.assert_frame_equal(of_two, of_one, rtol=1e-4)


@pytest.mark.soak
def test_a_run_of_two_processes_ends_at_a_signal_and_resumes(tmp_path: Path) -> None:
    words = ["run", "janus_lora", "toy", "--seed", "1", "--trainer.max_epochs", "6", "--keep", "all"]
    words.append("--results")
    several = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    started = [sys.executable, "-m", "cl_bench", *words, str(tmp_path / "two"), *several]
    file = tmp_path / "errors"
    with file.open("w") as errors:
        process = subprocess.Popen(started, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        assert any("accuracy over" in line for line in process.stdout)
        process.terminate()
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == cli.INTERRUPTED
    assert "Run the same command again to resume." in file.read_text()
    done = command(*words, str(tmp_path / "two"), *several)
    assert done.returncode == 0, done.stderr
    assert cli.main([*words, str(tmp_path / "one")]) == 0
    files = [next((tmp_path / name).rglob(FILE_NAME)) for name in ("two", "one")]
    two, one = map(read, files)
    assert two.rows == one.rows
    of_two, of_one = (predictions.read(file.parent) for file in files)
    whole = ["after", "sample", "label", "prediction", "within"]
    pd.testing.assert_frame_equal(of_two[whole], of_one[whole])
    assert [attempt["differs"] for attempt in two.provenance["resumed"]] == [{}]


BROKEN = """
import torch
from strategies.lora import LoRA

class Broken(LoRA):
    def loss(self, features, labels):
        if torch.distributed.get_rank() == 1 and not self.experience.is_first:
            raise ArithmeticError("no basis left")
        return super().loss(features, labels)
"""


def test_a_process_that_fails_ends_the_run_with_its_sentence(tmp_path: Path) -> None:
    (tmp_path / "broken_in_one.py").write_text(BROKEN)
    config = tmp_path / "broken.yaml"
    config.write_text("model: {class_path: broken_in_one.Broken}")
    several = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = command("run", str(config), "toy", "--results", str(tmp_path / "results"), *several)
    sentence = "Process 1: ArithmeticError: no basis left"
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith(f"error: {sentence}")
    assert "Traceback" not in done.stderr
    (file,) = tmp_path.rglob(FILE_NAME)
    result = read(file)
    assert (result.status, len(result.rows), result.error) == ("failed", 1, sentence)
    assert "no basis left" in (file.parent / "error.txt").read_text()


def test_the_first_process_may_report_before_it_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[float] = []
    monkeypatch.setattr("time.sleep", events.append)
    monkeypatch.setattr("os.kill", lambda process, _: events.append(process))
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"]) as child:
        child.wait()
    assert distributed._Patient(main_pid=-1, child_processes=[child])._run()
    assert events == [distributed.SECONDS_TO_REPORT, -1]


@pytest.mark.parametrize("strategy", ("auto", "ddp_spawn"))
def test_other_ways_to_start_processes_are_refused(
    strategy: str, tiny_backbone: Callable[..., Backbone]
) -> None:
    trainer = StreamTrainer(max_epochs=1, accelerator="cpu", devices=2, strategy=strategy)
    with pytest.raises(ValueError, match=r"only with --trainer\.strategy ddp"):
        trainer.run(LoRA(tiny_backbone()), Toy(num_experiences=3, image_size=8))


@settings(max_examples=50, deadline=None)
@given(count=st.integers(0, 60), world_size=st.integers(1, 9), batch_size=st.integers(1, 20))
def test_the_parts_of_all_processes_are_the_batches_of_one(
    count: int, world_size: int, batch_size: int
) -> None:
    sampler = SequentialSampler(range(count))
    parts = [RankBatches(sampler, batch_size, rank, world_size) for rank in range(world_size)]
    whole = [*RankBatches(sampler, batch_size)]
    assert {len([*part]) for part in parts} == {len(whole)}
    for number, batch in enumerate(whole):
        own = [[*part][number][: part.sizes[number]] for part in parts]
        assert [item for part in own for item in part] == batch
        assert max(map(len, own)) - min(map(len, own)) <= 1


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool))
def test_one_changed_number_changes_the_print(dtype: torch.dtype) -> None:
    def printed(value: Tensor) -> object:
        module = nn.Module()
        module.register_buffer("value", value)
        return _prints(module)

    value = torch.arange(7).to(dtype)
    for index in range(7):
        changed = value.clone()
        changed[index] = ~changed[index] if dtype == torch.bool else -changed[index] - 1
        assert printed(changed) != printed(value)
    assert printed(value.clone()) == printed(value)
    assert printed(value[:6]) != printed(value)


@pytest.mark.parametrize(("before", "now"), ((2, 1), (1, 2), (3, 2)))
@pytest.mark.parametrize("kind", ("moments", "sketch"))
def test_shares_of_a_sum_are_passed_on_to_more_or_fewer_processes(kind: str, before: int, now: int) -> None:
    layer = nn.Linear(4, 2)

    def blank() -> SecondMoments | InputSketch:
        # A sketch of as many rows as there are dimensions loses nothing.
        return SecondMoments([layer]) if kind == "moments" else InputSketch([layer], GPM(1, 4), rows=4)

    def recorded(seeds: range) -> SecondMoments | InputSketch:
        found = blank()
        with found.recording():
            for seed in seeds:
                layer(torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)))
        return found

    shares = [dict(recorded(range(rank, 6, before)).named_buffers()) for rank in range(before)]
    held = [blank() for _ in range(now)]
    for rank, one in enumerate(held):
        one.hold(shares[rank::now])
    together = blank()
    together.hold([dict(one.named_buffers()) for one in held if one.tokens.any()])
    assert torch.allclose(together.mean(), recorded(range(6)).mean(), atol=1e-6)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
