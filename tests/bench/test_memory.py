from __future__ import annotations

import torch
from torch import nn

from cl_bench.bench.memory import Peak, held_bytes

MEGA = 250_000  # floats in a megabyte


def test_the_peak_counts_what_is_alive_at_one_time() -> None:
    peak = Peak(torch.device("cpu"))
    with peak.watching():
        first = torch.ones(2 * MEGA)
        second = first + 1
        del first
        third = torch.ones(MEGA)
        del second, third
    assert 4e6 <= peak.bytes < 4.01e6


def test_the_peak_of_a_step_holds_what_its_backward_pass_needs() -> None:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(50, 50), nn.Sigmoid()) for _ in range(10)))
    x, peak = torch.ones(MEGA // 50, 50), Peak(torch.device("cpu"))
    with peak.watching():
        layers(x).sum().backward()
    with_gradients = peak.bytes
    with peak.watching(), torch.no_grad():
        layers(x)
    assert 10e6 < with_gradients < 16e6
    assert peak.bytes < 4e6


def test_shared_tensors_are_held_once_and_optimizers_twice_their_parameters() -> None:
    model = nn.Linear(MEGA, 1, bias=False)
    again = nn.ModuleList([model, model])
    assert held_bytes(again) == 1_000_000
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, MEGA)).backward()
    optimizer.step()
    assert 4_000_000 <= held_bytes(again, optimizer) < 4_000_100
