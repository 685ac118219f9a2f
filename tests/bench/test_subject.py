from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cl_bench.bench.subject import Subject, fill
from cl_bench.maths.memory import GPM, DualGPM


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


def test_the_operations_of_a_step_are_those_of_all_its_products(subject: Callable[..., Subject]) -> None:
    batch, tokens, depth, width, rank, classes = 4, 5, 2, 64, 20, 2  # of keys and values together
    pixels = 3 * 8 * 8
    rows = batch * tokens
    patches = batch * (tokens - 1) * pixels * width
    mlp_and_projection = rows * (4 + 4 + 1) * width**2
    qkv, down, up = rows * 3 * width**2, rows * width * rank, rows * rank * 3 * width
    attention = 2 * batch * tokens**2 * width
    head = batch * width * classes
    forward = patches + depth * (mlp_and_projection + qkv + down + up + attention) + head
    # To inputs, and to both factors: nothing before the first adapter asks for a gradient.
    backward = depth * (mlp_and_projection + 2 * attention + up + up + down) + (qkv + down) + 2 * head
    for precision in ("32-true", "bf16-mixed"):
        stepping = subject("lora", precision=precision)
        assert stepping.flops(stepping.batch(batch)) == 2 * (forward + backward)


def test_a_training_is_compiled_as_whoever_made_it_asks(subject: Callable[..., Subject]) -> None:
    sizes: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        sizes.extend(tensor.shape[0] for tensor in inputs if getattr(tensor, "ndim", 0) == 4)
        return graph.forward

    torch._dynamo.register_backend(counting, name="sizes")
    torch.compiler.reset()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        stepping = subject("lora", compiler="sizes")
        for size in (4, 6, 8, 6):
            stepping.step(stepping.batch(size))
        stepping.flops(stepping.batch(10))  # which are counted in code that is not compiled
    images = [size for size in sizes if size != 64]  # and not the weight of the patches
    assert images == [4, 6, 8]


class Waits(TorchDispatchMode):
    """Remembers what would make the host wait for an accelerator: values and shapes that depend on values."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "is_nonzero",
        "equal",
        "masked_select",
    )
    INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")

    def __init__(self, found: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        by_mask = name in self.INDEXING and any(_is_mask(index) for index in args[1])
        repeated = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in self.WAITING or by_mask or repeated:
            self.found.append(name)
        return func(*args, **kwargs)


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


class Fetches(TorchFunctionMode):
    """Remembers what asks for a tensor in the memory of the host, which is no copy where it is already."""

    FETCHING = ("cpu", "numpy", "__array__", "tolist")

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in self.FETCHING or (name == "to" and "cpu" in (*args[1:], *kwargs.values())):
            self.found.append(name)
        return func(*args, **kwargs)


@contextmanager
def watched(found: list[str]) -> Iterator[None]:
    with Waits(found), Fetches(found):
        yield


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, torch.ones(3)),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.tolist(),
    ],
)
def test_whatever_waits_is_seen(waiting: Callable[[torch.Tensor], object]) -> None:
    found: list[str] = []
    with watched(found):
        waiting(torch.ones(3))
    assert found


def test_what_does_not_wait_is_not() -> None:
    found: list[str] = []
    x = torch.ones(3)
    with watched(found):
        x[torch.tensor([0, 2])] = x.to(torch.float64)[:2].float()
        x.repeat_interleave(torch.tensor([1, 2, 1]), output_size=4)
    assert found == []


@pytest.mark.parametrize("stem", ["lora", "inflora", "keeplora", "janus_lora", "lora_gpm_gr"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_no_step_waits_for_the_device(subject: Callable[..., Subject], stem: str, precision: str) -> None:
    stepping = subject(stem, precision=precision)
    found: list[str] = []
    for _ in range(3):  # fewer than the logger waits for
        stepping.step(stepping.batch(4), watched(found))
    assert found == []


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
