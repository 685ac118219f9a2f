"""How long missing cells would take on this machine, from its measured speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cl_bench.loop.provenance import device_name
from cl_bench.network.backbones import Backbone

_IMAGES = 4  # in a measured batch: little memory, and a CPU is not faster with more
_REPETITIONS = 2


@dataclass(frozen=True)
class Speed:
    """Seconds per image on this machine.

    Attributes:
        training: Forward and backward through the whole backbone with frozen weights.
        evaluation: Forward only.
        device: Name of the device, threads and precision.
    """

    training: float
    evaluation: float
    device: str


def speed(backbone: Backbone) -> Speed:
    """Return the measured speed of ``backbone``, on the accelerator if there is one.

    Gradients flow back to the first block but weights have none, as with adapters in every block.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = backbone.to(device)
    images = torch.rand(_IMAGES, 3, backbone.image_size, backbone.image_size, device=device)

    def training() -> None:
        backbone(images.requires_grad_()).sum().backward()

    def evaluation() -> None:
        with torch.no_grad():
            backbone(images.detach())

    threads = torch.get_num_threads()
    name = f"{device_name(device)}, {threads} {'thread' if threads == 1 else 'threads'}, float32"
    return Speed(_seconds(training, device) / _IMAGES, _seconds(evaluation, device) / _IMAGES, name)


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    step()  # the first call allocates memory
    _wait(device)
    began = time.perf_counter()
    for _ in range(_REPETITIONS):
        step()
    _wait(device)
    return (time.perf_counter() - began) / _REPETITIONS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(speed: Speed, images: tuple[int, int], epochs: int, num_experiences: int) -> float:
    """Return about how many seconds one run takes: every epoch, and every evaluation over the classes seen.

    ``train epochs s_train + test (T + 1) / 2 s_test``, without the data passes of a strategy and the reading
    of images.

    >>> seconds(Speed(0.1, 0.05, "cpu"), (1000, 200), epochs=2, num_experiences=3)
    220.0
    """
    train, test = images
    return train * epochs * speed.training + test * (num_experiences + 1) / 2 * speed.evaluation


def duration(seconds: float) -> str:
    """Return ``seconds`` as text, in a unit that gives a number from about 1.5 to 100.

    >>> duration(42), duration(5400), duration(400000)
    ('42 s', '1.5 h', '4.6 days')
    """
    for unit, size in (("days", 172_800), ("h", 5_400), ("min", 120)):
        if seconds >= size:
            return f"{seconds / {'days': 86_400, 'h': 3_600, 'min': 60}[unit]:.1f} {unit}"
    return f"{seconds:.0f} s"
