from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import FAULTS
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor
from twin import TWIN, SecondDevice, TwinAccelerator, TwinTensor

from cl_bench.artifacts.keeping import keepers
from cl_bench.check.subject import Run, State, Subject, differing
from cl_bench.loop import progress
from cl_bench.loop.checkpoint import Checkpoints
from cl_bench.network.backbones import Backbone
from cl_bench.results.result import Result
from cl_bench.run.configs import CONFIGS, Config
from cl_bench.run.run import quiet
from cl_bench.survey.agreement import WAITING, OnHost
from strategies.lora import LoRA

CONFIG_FILES = sorted(CONFIGS.glob("strategies/*.yaml"))
each_strategy = pytest.mark.parametrize("config", CONFIG_FILES, ids=lambda path: path.stem)

IN_BF16 = {"janus_lora", "keeplora", "l2p", "lora"}
"""Strategies that are tested in bf16 every time; `make soak` tests all."""

# inference_mode is off because torch gives a tensor subclass that is made in it the storage of the CPU.
ON_TWIN = ("--trainer.accelerator=twin", "--trainer.strategy=twin", "--trainer.inference_mode=false")


class NoWait(Callback):
    """Refuses whatever makes the host wait inside a training step, the optimizer's step included."""

    def __init__(self, device: SecondDevice) -> None:
        self.device = device

    def on_train_batch_start(self, *args: Any) -> None:
        self.watching = self.device.watching()
        self.watching.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        self.watching.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fused kernels exist for the CPU only; without them both devices must give the same bits."""
    AcceleratorRegistry.register("twin", TwinAccelerator, description="A second device.", override=True)
    StrategyRegistry.register("twin", SingleDeviceStrategy, override=True, device=TWIN)
    fuse = Backbone.fuse_attention
    monkeypatch.setattr(progress, "in_one_kernel", lambda optimizer: None)
    monkeypatch.setattr(Backbone, "fuse_attention", lambda backbone, fused: fuse(backbone, False))
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    AcceleratorRegistry.pop("twin")
    StrategyRegistry.pop("twin")


@dataclass
class Trained:
    run: Run
    result: Result

    @property
    def state(self) -> State:
        state = self.run.strategy.state_dict().items()
        return {name: value.cpu() for name, value in state if isinstance(value, Tensor)}

    @property
    def correct(self) -> list[list[int]]:
        return [row.correct for row in self.result.rows if row is not None]


def built(config: Path | Config, options: tuple[str, ...], callbacks: list[Callback]) -> Run:
    run = Subject(config, options).run(
        {"data.num_experiences": 2, "data.batch_size": 6, "trainer.max_epochs": 1}, callbacks
    )
    plugin = run.trainer.precision_plugin
    if run.trainer.strategy.root_device.type == "twin" and hasattr(plugin, "device"):
        plugin.device = "twin"  # Lightning knows no autocast but for cpu, mps and cuda
    return run


def trained(config: Path | Config, *options: str, callbacks: list[Callback] | None = None) -> Trained:
    with quiet():
        run = built(config, options, callbacks or [])
        return Trained(run, run.trainer.run(run.strategy, run.stream))


def no_wait(config: Path, device: SecondDevice) -> list[Callback]:
    return [] if config.stem in WAITING else [NoWait(device)]


class Stops(Callback):
    """Asks for the end of the run in the second experience."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.course.experience.index == 1:
            trainer.course.interruption.requested = True


@each_strategy
def test_another_device_stops_and_resumes_with_the_bits_of_the_cpu(config: Path, tmp_path: Path) -> None:
    on_cpu = trained(config)
    with SecondDevice() as device, quiet():
        first = built(config, ON_TWIN, [Stops(), *no_wait(config, device)])
        trains = on_cpu.result.costs[-1].trainable_parameters > 0
        with pytest.raises(KeyboardInterrupt) if trains else nullcontext():
            first.trainer.run(first.strategy, first.stream, checkpoints=Checkpoints(tmp_path, "cell"))
        rest = built(config, ON_TWIN, no_wait(config, device))
        on_twin = Trained(
            rest, rest.trainer.run(rest.strategy, rest.stream, checkpoints=Checkpoints(tmp_path, "cell"))
        )
        assert on_twin.correct == on_cpu.correct
        assert differing(on_twin.state, on_cpu.state) == []


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, marks=() if config.stem in IN_BF16 else pytest.mark.soak, id=config.stem)
        for config in CONFIG_FILES
    ],
)
def test_another_device_trains_in_bf16_without_a_wait(config: Path) -> None:
    with SecondDevice() as device:
        watch = no_wait(config, device)
        found = trained(config, *ON_TWIN, "--trainer.precision=bf16-mixed", callbacks=watch)
        assert all(value.isfinite().all() for value in found.state.values() if value.is_floating_point())
    assert len(found.correct) == 2


def causes(error: BaseException | None) -> Iterator[str]:
    """Yield the message of an error, then those of the errors it was raised from."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_that_the_cpu_forgives_is_found(fault: type[LoRA]) -> None:
    config = {"model": {"class_path": f"faults.{fault.__name__}"}}
    assert trained(config).result.status == "done"
    with SecondDevice() as device, pytest.raises(Exception) as caught:
        trained(config, *ON_TWIN, callbacks=[NoWait(device)])
    assert FAULTS[fault] in " ".join(causes(caught.value))


def test_draws_on_the_host_are_those_of_the_cpu() -> None:
    images = torch.rand(4, 3)

    def draws(device: torch.device) -> list[Tensor]:
        torch.manual_seed(0)
        dropped = torch.nn.functional.dropout(images.to(device), 0.5)
        return [torch.rand(3, device=device), torch.randperm(9, device=device), dropped.normal_()]

    with SecondDevice(), OnHost():  # type: ignore[no-untyped-call]
        on_twin = draws(TWIN)
        assert all(one.device.type == "twin" for one in on_twin)
        found = [one.cpu() for one in on_twin]
    assert all(map(torch.equal, found, draws(torch.device("cpu"))))


def test_tensors_of_the_second_device_hold_real_values() -> None:
    with SecondDevice():
        matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).to(TWIN)
        assert isinstance(matrix, TwinTensor)
        assert torch.linalg.eigvalsh(matrix).tolist() == pytest.approx([1.0, 3.0])


def test_a_second_device_keeps_what_the_cpu_keeps(tmp_path: Path) -> None:
    kept = []
    for folder, options in ((tmp_path / "cpu", ()), (tmp_path / "twin", ON_TWIN)):
        with SecondDevice(), quiet():
            run = built(CONFIGS / "strategies" / "lora.yaml", options, [])
            own = keepers("all", folder, run.strategy, "cell", logits=True, require=lambda: None)
            run.trainer.callbacks += own
            run.trainer.run(run.strategy, run.stream)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        kept.append({path.relative_to(folder): path.read_bytes() for path in files})
    assert len(kept[0]) == 4
    assert kept[0] == kept[1]
