from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cl_bench.bench.subject import Subject, fill
from cl_bench.data.experience import Batch
from cl_bench.loop.checkpoint import FOLDER_NAME, Checkpoints
from cl_bench.maths.memory import GPM, DualGPM, reaching
from cl_bench.results.result import FILE_NAME
from strategies.lora import LoRA


@pytest.mark.parametrize("stem", ["lora", "inflora", "keeplora", "janus_lora", "loda", "lora_gpm_gr"])
def test_every_method_steps_late_in_the_stream_in_a_whole_run(
    subject: Callable[..., Subject], tmp_path: Path, stem: str
) -> None:
    late = subject(stem, number=20)

    def steps() -> Iterator[Batch]:
        adapters = [p for layer in late.strategy.layers for p in layer.adapters.parameters()]  # type: ignore[union-attr]
        before = [parameter.detach().clone() for parameter in adapters]
        yield late.stream.batch(4)
        assert any(not torch.equal(old, new) for old, new in zip(before, adapters, strict=True))
        assert late.strategy.head.num_classes == 40

    took = late.run(steps())
    assert bool(took.pop("passes")) == (stem != "lora")
    assert min(took.values()) > 0 and took["overhead"] > 4 * took["checkpoint"]
    result = json.loads((tmp_path / FILE_NAME).read_text())
    assert result["status"] == "done" and len(result["rows"]) == 2
    assert not (tmp_path / FOLDER_NAME).exists()


def slower(call: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return call(*args, **kwargs)

    return called


def test_the_overhead_holds_checkpoints_and_no_step_hook_or_evaluation(
    subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints, "write", slower(Checkpoints.write, 0.02))
    for name in ("training_step", "after_training", "test_step"):
        monkeypatch.setattr(LoRA, name, slower(getattr(LoRA, name), 0.5))
    took = subject("lora").run(iter([]))
    assert took["checkpoint"] > 0.02
    assert 4 * 0.02 < took["overhead"] < 0.5 < min(took["work"], took["evaluation"])


def test_a_training_is_compiled_for_each_size(subject: Callable[..., Subject]) -> None:
    sizes: list[Any] = []

    def recording(graph: Any, inputs: Any) -> Any:
        sizes.extend(tensor.shape[0] for tensor in inputs if getattr(tensor, "ndim", 0) == 4)
        return graph.forward

    torch._dynamo.register_backend(recording, name="sizes")
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        ours = subject("lora", compiler="sizes")

        def steps() -> Iterator[Batch]:
            sizes.clear()
            for size in (4, 6, 8, 6):
                yield ours.stream.batch(size)
            with torch.compiler.set_stance("force_eager"):
                yield ours.stream.batch(10)
            images = [size for size in sizes if size != 64]  # and not the weight of the patches
            assert images == [6, 8]  # 4 was compiled in the first experience

        ours.run(steps())


class Waits(TorchDispatchMode):
    """Records what makes the host wait for an accelerator: values, and shapes that depend on values."""

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
    """Records what fetches a tensor into the memory of the host; on a CPU that copies nothing."""

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
def test_what_waits_is_recorded(waiting: Callable[[torch.Tensor], object]) -> None:
    found: list[str] = []
    with watched(found):
        waiting(torch.ones(3))
    assert found


def test_what_does_not_wait_is_not_recorded() -> None:
    found: list[str] = []
    x = torch.ones(3)
    with watched(found):
        x[torch.tensor([0, 2])] = x.to(torch.float64)[:2].float()
        x.repeat_interleave(torch.tensor([1, 2, 1]), output_size=4)
    assert found == []


@pytest.mark.parametrize("stem", ["lora", "inflora", "keeplora", "janus_lora", "lora_gpm_gr"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_no_step_waits_for_the_device(subject: Callable[..., Subject], stem: str, precision: str) -> None:
    ours = subject(stem, precision=precision)
    found: list[str] = []

    def steps() -> Iterator[Batch]:
        for _ in range(3):  # fewer than the logger waits for
            with watched(found):
                yield ours.stream.batch(4)

    ours.run(steps())
    assert found == []


@pytest.mark.parametrize("kind", [GPM, DualGPM])
def test_a_memory_is_filled_up_to_the_share_with_random_directions(kind: type[GPM]) -> None:
    memory = kind([0, 1, 1], dim=20, dtype=torch.float32)
    first = torch.diag(torch.tensor([1.0] * 3 + [0.0] * 17)).double()
    memory.update(first.expand(2, 20, 20), reaching(1.0))
    fill(memory, share=0.75)
    assert memory.dims == [15, 15, 15]
    assert memory.residual(torch.eye(20)[:, :3], 0).abs().max() < 1e-5  # what was protected still is
    fill(memory, share=0.5)
    assert memory.dims == [15, 15, 15]  # it never shrinks
