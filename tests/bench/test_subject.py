from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cl_bench.bench.subject import Subject, fill
from cl_bench.subspace import GPM, DualGPM


@pytest.mark.parametrize("stem", ["lora", "inflora", "keeplora", "janus_lora", "loda", "lora_gpm_gr"])
def test_every_method_steps_late_in_the_stream_and_finishes(
    subject: Callable[..., Subject], stem: str
) -> None:
    late = subject(stem, number=20)
    adapters = [p for layer in late.strategy.layers for p in layer.adapters.parameters()]  # type: ignore[union-attr]
    before = [parameter.detach().clone() for parameter in adapters]
    batch = late.batch(4)
    late.step(batch)
    assert any(not torch.equal(old, new) for old, new in zip(before, adapters, strict=True))
    assert late.strategy.head.num_classes == 40
    assert late.peak_bytes(batch) > 0 and late.flops(batch) > 0
    after = late.finish()
    assert after.work > 0
    assert bool(after.passes) == (stem != "lora")
    late.evaluate(batches=2, size=40)


def test_a_step_late_in_the_stream_takes_the_operations_of_an_early_one(
    subject: Callable[..., Subject],
) -> None:
    early, late = subject("inflora", number=2), subject("inflora", number=20)
    assert early.flops(early.batch(4)) == late.flops(late.batch(4))


class Waits(TorchDispatchMode):
    """Remembers what would make the host wait for an accelerator: values and shapes that depend on values."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "_unique2",
        "unique_dim",
        "is_nonzero",
        "equal",
        "masked_select",
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in self.WAITING:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stem", ["lora", "inflora", "keeplora", "janus_lora", "lora_gpm_gr"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_no_step_waits_for_the_device(subject: Callable[..., Subject], stem: str, precision: str) -> None:
    stepping, waits = subject(stem, precision=precision), Waits()
    for _ in range(3):  # fewer than the logger waits for
        stepping.step(stepping.batch(4), waits)
    assert waits.found == []


def test_what_trains_nothing_has_no_step(subject: Callable[..., Subject]) -> None:
    with pytest.raises(ValueError, match="no step to measure"):
        subject("ncm")


def test_what_goes_wrong_in_a_step_reaches_whoever_asked_for_it(subject: Callable[..., Subject]) -> None:
    broken = subject("lora")
    with pytest.raises(ValueError, match="do not fit a backbone of 16 pixels"):
        broken.step((torch.zeros(2, 3, 8, 8), torch.tensor([2, 3])))


@pytest.mark.parametrize("kind", [GPM, DualGPM])
def test_a_memory_is_filled_up_to_the_share_with_directions_at_random(kind: type[GPM]) -> None:
    memory = kind(num_layers=2, dim=20, dtype=torch.float32)
    first = torch.diag(torch.tensor([1.0] * 3 + [0.0] * 17)).double()
    memory.update(first.expand(2, 20, 20), threshold=1.0)
    fill(memory, share=0.75)
    assert memory.dims == [15, 15]
    assert memory.residual(torch.eye(20)[:, :3], 0).abs().max() < 1e-5  # what was protected still is
    fill(memory, share=0.5)
    assert memory.dims == [15, 15]  # which is more
