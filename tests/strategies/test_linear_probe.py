from __future__ import annotations

from collections.abc import Callable

import torch

from cl_bench.data.experience import Experience
from cl_bench.network.backbones import Backbone
from strategies.linear_probe import LinearProbe


def test_only_the_current_head_is_trained(tiny_backbone: Callable[..., Backbone]) -> None:
    probe = LinearProbe(tiny_backbone())
    for index in range(2):
        probe.expand(Experience(index, 2, range(2 * index, 2 * index + 2)))
        trained = [name for name, parameter in probe.named_parameters() if parameter.requires_grad]
        assert trained == [f"head.parts.{index}.weight", f"head.parts.{index}.bias"]
    assert probe(torch.rand(3, 3, 8, 8)).shape == (3, 4)
