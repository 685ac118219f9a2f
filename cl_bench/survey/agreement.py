"""Rows that check one strategy on a device: against the CPU, against itself, cut off, and in bf16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from cl_bench.check.subject import Run, State, Subject, copied_state, differing, largest_change, some
from cl_bench.errors import sentence
from cl_bench.loop.checkpoint import Checkpoints
from cl_bench.run.configs import config_file
from cl_bench.survey.worker import Found

WAITING = frozenset({"loda"})
"""Strategies whose step waits for the device by design: LoDA splits every batch by its classes."""

# Half the default batch, so that an epoch has two steps and one can be cut off between them.
_STREAM = {"data.num_experiences": 2, "data.batch_size": 6, "trainer.max_epochs": 1}

# In double precision, where both devices round at 1e-16, any fault is far above this.
_ROUNDING = 1e-8
_NUDGE = 1e-6  # relative; float32, in which weights are built, resolves it

_SIGNS_ARE_FREE = {"_linalg_eigh", "_linalg_svd", "linalg_qr", "geqrf", "linalg_eig"}


@dataclass(frozen=True)
class Outcome:
    """What a run left.

    Attributes:
        state: Parameters and persistent buffers, on the CPU.
        correct: Counts of correct predictions, a list for each experience.
        peak: Most bytes of the device in use at a time.
    """

    state: State
    correct: list[list[int]]
    peak: int


class OnHost(TorchDispatchMode):
    """Draws random numbers and decomposes on the CPU, whatever device asks.

    A GPU has a generator of its own, and the sign of a singular vector is free: two devices that compute
    correctly would train different adapters.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``function`` with copies on the CPU if it draws or decomposes."""
        kwargs, name = dict(kwargs or {}), function.overloadpacket.__name__
        draws = torch.Tag.nondeterministic_seeded in function.tags and "attention" not in name
        if not draws and name not in _SIGNS_ARE_FREE:
            return function(*args, **kwargs)
        tensors = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        device = torch.device(kwargs.get("device") or (tensors[0].device if tensors else "cpu"))
        if device.type in ("cpu", "meta"):
            return function(*args, **kwargs)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        own_args, own_kwargs = pytree.tree_map_only(Tensor, Tensor.cpu, (args, kwargs))
        found = function(*own_args, **own_kwargs)
        if function._schema.is_mutable:
            return args[0].copy_(found)
        return pytree.tree_map_only(Tensor, lambda one: one.to(device), found)


class NoWait(Callback):
    """Lets CUDA refuse whatever makes the host wait inside a training step, the optimizer's step included."""

    def on_train_batch_start(self, *args: Any) -> None:
        """Refuse."""
        torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, *args: Any) -> None:
        """Allow it again."""
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, *args: Any) -> None:
        """Allow it again."""
        torch.cuda.set_sync_debug_mode("default")


class CutOff(Callback):
    """Ends the run in the second experience, without a word to it and without a last checkpoint."""

    class Killed(Exception):
        """The run is cut off."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """End the run."""
        if trainer.course.experience.index == 1:
            raise self.Killed


def check(stem: str, settings: Mapping[str, Any], device: str) -> Found:
    """Check one strategy on a device.

    Args:
        stem: Its config.
        settings: Settings that replace those of the tiny transformer.
        device: cuda or cpu.
    """
    subject, cuda = Subject(config_file("strategies", stem)), device == "cuda"
    found: Found = {"reasons": {}, "failed": []}

    def trained(
        *callbacks: Callback, on: str = device, nudge: float = 0.0, folder: Path | None = None, **own: Any
    ) -> Outcome:
        accelerator = "gpu" if on == "cuda" else "cpu"
        # Lightning leaves the process deterministic after a run that was, unless the next one says otherwise.
        values = {"trainer.accelerator": accelerator, "trainer.deterministic": False}
        own = {f"trainer.{key}": value for key, value in own.items()}
        run = subject.run({**_STREAM, **settings, **values, **own}, callbacks)
        return _outcome(run, nudge, None if folder is None else Checkpoints(folder, "cell", every=0))

    def against_cpu() -> None:
        cpu, nudged = (trained(on="cpu", nudge=nudge, precision="64-true") for nudge in (0.0, _NUDGE))
        with OnHost():  # type: ignore[no-untyped-call]
            found.update(agreement(trained(precision="64-true"), cpu, nudged))

    def repeated() -> None:
        whole = trained(deterministic=True)
        found["peak_bytes"] = whole.peak if cuda else None
        with TemporaryDirectory() as name:
            try:
                trained(CutOff(), deterministic=True, folder=Path(name))
            except CutOff.Killed:
                pass
            resumed = trained(deterministic=True, folder=Path(name))
        names = differing(resumed.state, whole.state) or ["counts"] * (resumed.correct != whole.correct)
        found["same_bits"] = not names
        if names:
            again = differing(trained(deterministic=True).state, whole.state)
            raise ValueError(
                f"{some(again)} differ between two deterministic runs"
                if again
                else f"{some(names)} differ after a run was cut off and resumed"
            )

    def half() -> None:
        watch = [NoWait()] if cuda and stem not in WAITING else []
        found["no_wait"] = False if watch else None
        outcome = trained(*watch, precision="bf16-mixed")
        found["no_wait"] = True if watch else None
        floats = {name: value for name, value in outcome.state.items() if value.is_floating_point()}
        if endless := [name for name, value in floats.items() if not value.isfinite().all()]:
            raise ValueError(f"{some(endless)} are not finite in bf16")

    for claim in (against_cpu, repeated, half):
        try:
            claim()
        except Exception as error:  # the other claims are checked all the same
            found["failed"].append(f"{claim.__name__.replace('_', ' ')}: {sentence(error)}")
    if not cuda:
        found["reasons"] |= dict.fromkeys(("peak_bytes", "no_wait"), "Only CUDA reports it.")
    elif stem in WAITING:
        found["reasons"]["no_wait"] = "It splits every batch by its classes, so the host reads labels."
    return found


def agreement(on_device: Outcome, on_cpu: Outcome, nudged: Outcome) -> Found:
    """Compare a run on a device with one on the CPU, both in double precision.

    A tensor may differ by as much as a relative change of every weight by 1e-6 moves it on the CPU, and by
    1e-8 in any case. Where an input has no component, the direction of a decomposition is arbitrary: such a
    tensor moves by its own size, and there the comparison says nothing. Rounding is 1e-10 of that change.

    Raises:
        ValueError: If they do not agree.

    >>> one, other = (Outcome({"w": torch.tensor([value])}, [[3]], 0) for value in (1.0, 1.5))
    >>> agreement(one, one, other) | {"tolerance": 0}
    {'counts_equal': True, 'apart': 0.0, 'tolerance': 0}
    >>> agreement(other, one, one)
    Traceback (most recent call last):
    ValueError: w differ from those on the CPU, by up to 5.0e-01, where 1.0e-08 is allowed
    """
    if on_device.state.keys() != on_cpu.state.keys():
        raise ValueError(f"{some(sorted(on_device.state.keys() ^ on_cpu.state.keys()))} exist on one device")
    apart = {name: largest_change(value, on_cpu.state[name]) for name, value in on_device.state.items()}
    allowed = {
        name: max(_ROUNDING, largest_change(nudged.state[name], value))
        for name, value in on_cpu.state.items()
    }
    if wrong := [name for name in apart if not apart[name] <= allowed[name]]:
        most = max(wrong, key=lambda name: apart[name])
        raise ValueError(
            f"{some(wrong)} differ from those on the CPU, by up to {apart[most]:.1e}, where "
            f"{allowed[most]:.1e} is allowed"
        )
    if on_device.correct != on_cpu.correct and nudged.correct == on_cpu.correct:
        raise ValueError("the counts of correct predictions differ from those on the CPU")
    largest = max(apart, key=lambda name: apart[name] / allowed[name])
    equal = on_device.correct == on_cpu.correct
    return {"counts_equal": equal, "apart": apart[largest], "tolerance": allowed[largest]}


def graphs(stem: str, compiler: str, device: str) -> Found:
    """Count the graphs that compiling the tiny transformer makes of a stream."""
    torch.compiler.reset()
    counters.clear()
    accelerator = "gpu" if device == "cuda" else "cpu"
    values = {"backbone.compiler": compiler, "trainer.accelerator": accelerator}
    run = Subject(config_file("strategies", stem)).run({**_STREAM, **values, "trainer.deterministic": False})
    run.trainer.run(run.strategy, run.stream)
    return {"graphs": counters["stats"]["unique_graphs"]}


def _outcome(run: Run, nudge: float, checkpoints: Checkpoints | None) -> Outcome:
    """Run a strategy whose weights are changed by a share ``nudge`` first, with alternating signs."""
    with torch.no_grad():
        for weight in run.strategy.backbone.parameters() if nudge else ():
            signs = torch.arange(weight.numel(), device=weight.device) % 2 * 2 - 1
            weight.mul_(1 + nudge * signs.view_as(weight))
    result = run.trainer.run(run.strategy, run.stream, checkpoints=checkpoints)
    state = {name: value.cpu() for name, value in copied_state(run.strategy).items()}
    correct = [row.correct for row in result.rows if row is not None]
    return Outcome(state, correct, result.costs[-1].peak_memory_bytes)
