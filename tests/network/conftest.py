from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_bench.network.adapters import AdaptedLinear

Fill = Callable[[Iterable[AdaptedLinear]], None]


@pytest.fixture
def images() -> Tensor:
    """Three random images of 8 pixels."""
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fill() -> Fill:
    """Gives every up-projection values that a trained one could have."""

    def with_noise(layers: Iterable[AdaptedLinear]) -> None:
        generator = torch.Generator().manual_seed(1)
        for layer in layers:
            for name in layer.rows:
                torch.nn.init.normal_(layer.adapter(name).B, std=0.3, generator=generator)

    return with_noise


@pytest.fixture(scope="session")
def counting_backend() -> list[Any]:
    """The graphs that ``counting``, a compiler that leaves them unchanged, has compiled."""
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.register_backend(counting, name="counting")
    return graphs


@pytest.fixture
def counted(counting_backend: list[Any]) -> list[Any]:
    """The graphs that ``counting`` compiles in one test, which starts with nothing compiled."""
    torch.compiler.reset()
    counting_backend.clear()
    return counting_backend
