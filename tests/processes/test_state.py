from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from cl_bench.maths.memory import GPM, DualGPM, reaching
from cl_bench.measure.moments import SecondMoments
from cl_bench.processes.state import NoPlace, put

WIDTH = 16


def moments(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Second moments (2, d, d) of inputs whose energy falls from direction to direction."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2, WIDTH, 40, dtype=torch.float64, generator=generator)
    return (inputs * 0.7 ** torch.arange(40)).matmul(inputs.mT).to(dtype)


def grown(memory: GPM, experiences: int, threshold: float) -> GPM:
    for seed in range(experiences):
        memory.update(moments(seed), reaching(threshold))
    return memory


def model(part: nn.Module) -> nn.Module:
    """A model of which ``part`` is one; the other decides the device."""
    return nn.ModuleDict({"part": part, "layer": nn.Linear(1, 1)})


def take(target: nn.Module, source: nn.Module) -> None:
    """Bring ``target`` to the state of ``source``, by way of a file."""
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for name in target.state_dict() | saved:
        if not name.endswith("_extra_state"):
            put(target, name, saved.get(name))


def equal(one: nn.Module, other: nn.Module) -> bool:
    mine, its = one.state_dict(), other.state_dict()
    return mine.keys() == its.keys() and all(
        mine[name].dtype == its[name].dtype and torch.equal(mine[name], its[name]) for name in mine
    )


@pytest.mark.parametrize("kind", [GPM, DualGPM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_memory_of_any_width_takes_a_saved_state_and_continues_from_it(
    kind: type[GPM], dtype: torch.dtype
) -> None:
    saved, empty, fuller = kind(2, WIDTH), kind(2, WIDTH), grown(kind(2, WIDTH), 9, 0.99)
    saved.update(moments(0, dtype), reaching(0.9))
    assert empty.dims < saved.dims < fuller.dims
    for other in (empty, fuller):
        take(model(other), model(saved))
        assert equal(other, saved)
    for seed, threshold in enumerate((0.95, 0.9, 0.99, 0.999)):
        for memory in (saved, empty, fuller):
            memory.update(moments(seed, dtype), reaching(threshold))
        assert equal(empty, saved)
        assert equal(fuller, saved)


def test_either_form_of_a_basis_replaces_the_other() -> None:
    empty, full = DualGPM(2, WIDTH), grown(DualGPM(2, WIDTH), 9, 0.99)
    assert set(full.state_dict()) == {"complement_0", "complement_1"}
    fresh = DualGPM(2, WIDTH)
    take(model(fresh), model(full))
    assert equal(fresh, full)
    take(model(full), model(empty))
    assert equal(full, empty)
    assert full.dims == [0, 0]


def test_a_memory_of_another_kind_is_refused() -> None:
    with pytest.raises(NoPlace, match=r"no place for part\.complement_0"):
        take(model(GPM(2, WIDTH)), model(grown(DualGPM(2, WIDTH), 9, 0.99)))


def test_sums_over_tokens_return_full_or_empty() -> None:
    layer, x = nn.Linear(3, 1), torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    whole, interrupted, resumed = SecondMoments([layer]), SecondMoments([layer]), SecondMoments([layer])
    with whole.recording():
        layer(x[:5]), layer(x[5:])
    with interrupted.recording():
        layer(x[:5])
    take(model(resumed), model(interrupted))
    with resumed.recording():
        layer(x[5:])
    assert torch.equal(resumed.mean(), whole.mean())
    take(model(resumed), model(SecondMoments([layer])))
    assert (resumed.sums.numel(), resumed.tokens.tolist()) == (0, [0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_parameter_that_an_optimizer_holds_takes_value_and_type(dtype: torch.dtype) -> None:
    layer = nn.Linear(2, 1)
    held, value = layer.weight, torch.tensor([[3.0, 1 / 3]], dtype=torch.float64).to(dtype)
    put(layer, "weight", value)
    assert layer.weight is held
    assert held.dtype == dtype
    assert torch.equal(held, value)
    value.zero_()
    assert held.all()


@pytest.mark.parametrize("name", ["absent", "absent.weight", "weight"])
def test_what_has_no_place_is_named(name: str) -> None:
    with pytest.raises(NoPlace, match=rf"no place for {name} with shape \(3,\).*: let expand make"):
        put(nn.Linear(2, 1), name, torch.zeros(3))
