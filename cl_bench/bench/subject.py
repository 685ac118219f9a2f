"""A strategy in the middle of a stream, ready to take one training step after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cl_bench.bench.handover import SteppedTraining
from cl_bench.bench.memory import Peak, held_bytes
from cl_bench.bench.stream import NoiseStream
from cl_bench.contracts.datamodule import Batch
from cl_bench.contracts.low_rank import memory_of
from cl_bench.loop.callbacks import StreamMetrics
from cl_bench.maths.memory import GPM
from cl_bench.results.result import Protocol, Result
from cl_bench.run.configs import CONFIGS, Config, config_file, load
from cl_bench.run.configuration import Configuration, resolve

_PROTECTED = 0.75  # of all directions, after the last experience
_ROUNDING = 1e-6  # a share of energy that a basis kept in float32 may miss of itself


@dataclass(frozen=True)
class Between:
    """What the hooks around a training took, in seconds.

    Attributes:
        passes: Of each data pass over one batch.
        work: Everything else: decompositions, projections, merging.
    """

    passes: list[float]
    work: float


class Subject:
    """A strategy, as its recipe for ImageNet-R sets it, that waits before a step of one experience.

    One step of the first experience has been taken. What is kept of the others before this one is random:
    heads, prototypes, and a memory that fills up to three quarters by the last.

    Args:
        stem: Config of the strategy.
        number: Number of the experience, from 2 on.
        stream: Where batches come from.
        backbone: Arguments of the backbone.
        trainer: Arguments of the trainer, such as its precision.
        images: Images of the batch that a data pass sees, and the step before.
        folder: Where curves are logged, as in every run.

    Raises:
        ValueError: If there is no such config, or the strategy trains nothing.

    Attributes:
        strategy: As it is at the moment.
        before: What came between the experience before and the first step.
    """

    def __init__(
        self,
        stem: str,
        number: int,
        *,
        backbone: Config,
        trainer: Config,
        stream: Config,
        images: int,
        folder: Path,
    ) -> None:
        configuration = configured(stem, NoiseStream, backbone=backbone, trainer=trainer, stream=stream)
        curves = CSVLogger(folder, name=stem)
        self.strategy, self.trainer = configuration.build([], [curves])
        self.stem = stem
        self.number = number
        datamodule = configuration.datamodule
        assert isinstance(datamodule, NoiseStream)
        self.stream = datamodule
        self.stream.setup()
        self._learn_first(images)
        self._pretend()
        self.stream.at_hand = [self.batch(images)]
        self._training = self._stepped(number - 1)
        self._training.start()
        self.before = self._between(0.0)

    def batch(self, size: int) -> Batch:
        """Return ``size`` images of the experience, on the device."""
        experience = self.stream.experiences[self.number - 1]
        return self.stream.batch(size, experience, self.trainer.strategy.root_device)

    def step(self, batch: Batch, around: AbstractContextManager[object] | None = None) -> None:
        """Take one training step on ``batch``, as Lightning does with all hooks, inside of ``around``."""
        self._training.step(batch, around)

    def peak_bytes(self, batch: Batch) -> int:
        """Take one step, and return the most memory that strategy and step need together."""
        peak = Peak(self.trainer.strategy.root_device)
        held = held_bytes(self.strategy, self.trainer.optimizers[0])
        self.step(batch, peak.watching())
        return held + peak.bytes

    def flops(self, batch: Batch) -> int:
        """Take one step, and return how many floating-point operations its products have.

        They are counted in attention as products and in code that is not compiled: the counter does not know
        every kernel that does the same.
        """
        counter = FlopCounterMode(display=False)
        self.step(batch, _counting(counter))
        return int(counter.get_total_flops())

    @torch.no_grad()
    def forward(self, batch: Batch) -> None:
        """Send the images of ``batch`` through the backbone."""
        self.strategy.features(batch[0])

    def finish(self) -> Between:
        """End the experience; return what came after the last step."""
        before = self.trainer.course.seconds["data_passes"]
        self.stream.pass_seconds.clear()
        self._training.finish()
        return self._between(before)

    def evaluate(self, batches: int, size: int) -> None:
        """Test on so many batches of ``size`` images, as after every experience of a run."""
        images, labels = self.batch(size)
        seen = self.stream.experience.num_classes_seen
        labels = torch.arange(size, device=labels.device) % seen
        self.stream.at_hand = [(images, labels)] * batches
        test_images = torch.ones(len(self.stream.class_names), dtype=torch.int64)  # of classes not yet seen
        test_images[:seen] = batches * labels.bincount(minlength=seen).cpu()
        counting = StreamMetrics(self._result(test_images))
        self.trainer.callbacks.append(counting)  # type: ignore[attr-defined]
        self.trainer.test(self.strategy, datamodule=self.stream, verbose=False)
        self.trainer.callbacks.remove(counting)  # type: ignore[attr-defined]

    def _result(self, test_images: Tensor) -> Result:
        """Return a result to count into, of a stream with so many ``test_images`` (C,) of each class."""
        return Result(
            strategy=self.stem,
            dataset=self.stream.name,
            experiences=[(one.classes.start, one.classes.stop) for one in self.stream.experiences],
            class_names=self.stream.class_names,
            test_images=test_images.tolist(),
            order=self.stream.order_name,
            seed=self.stream.seed,
            regime="sequential",
            protocol=Protocol({}, {}, {}),
        )

    def _between(self, before: float) -> Between:
        passes = list(self.stream.pass_seconds)
        return Between(passes, self.trainer.course.seconds["data_passes"] - before - sum(passes))

    def _stepped(self, index: int) -> SteppedTraining:
        """Return the training of one experience, not yet started."""
        experience = self.stream.experiences[index]
        self.stream.pass_seconds.clear()

        def learn() -> None:
            self.trainer.learn(self.strategy, self.stream, experience)

        return SteppedTraining(learn, self.stream.handover)

    def _learn_first(self, images: int) -> None:
        first = self.stream.experiences[0]
        batch = self.stream.batch(images, first, self.trainer.strategy.root_device)
        self.stream.at_hand = [batch]
        training = self._stepped(0)
        training.start()
        training.step(batch)
        training.finish()

    def _pretend(self) -> None:
        """Fill what the experiences in between would have left."""
        for experience in self.stream.experiences[1 : self.number - 1]:
            self.strategy.expand(experience)
        if (memory := memory_of(self.strategy)) is not None:
            last = len(self.stream.experiences) - 1
            fill(memory, _PROTECTED * (self.number - 1) / last)


@contextmanager
def _counting(counter: FlopCounterMode) -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), counter:
        yield


def fill(memory: GPM, share: float, seed: int = 0) -> None:
    """Protect random directions besides those that ``memory`` holds, until they are ``share`` of all."""
    generator = torch.Generator().manual_seed(seed)
    wanted = round(share * memory.dim)
    for number in range(memory.num_bases):
        projection = memory.projections.index(number)
        basis = memory.basis(projection).double()
        drawn = torch.randn(memory.dim, max(wanted - basis.shape[1], 0), generator=generator).to(basis)
        new = torch.linalg.qr(drawn - basis @ (basis.mT @ drawn)).Q
        memory.replace(projection, torch.cat([basis, new], dim=1))


def configured(
    stem: str, kind: type[NoiseStream], *, backbone: Config, trainer: Config, stream: Config
) -> Configuration:
    """Return how a strategy runs on noise, as its recipe for ImageNet-R sets it.

    Args:
        stem: Config of the strategy.
        kind: Class of the stream.
        backbone: Arguments of the backbone.
        trainer: Arguments of the trainer.
        stream: Arguments of the stream.

    Raises:
        ValueError: If there is no such config.
    """
    data = {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": stream}
    given: Config = {"backbone": backbone, "trainer": {"max_epochs": 1} | trainer, "data": data}
    return resolve([config_file("strategies", stem), _recipe(stem), given], ["--model.scheduler=null"])


def _recipe(stem: str) -> Config:
    """Return the published settings of the strategy itself, where there are any."""
    file = CONFIGS / "recipes" / "imagenet_r" / f"{stem}.yaml"
    return {"model": load(file)["model"]} if file.exists() else {}
