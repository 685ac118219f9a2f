"""The strategy that a run has kept, ready to predict.

Nothing that is read runs code. Tensors come from safetensors files, everything else from JSON and YAML. The
config names classes, and only what this environment can import already is imported: folders that the config
names under ``code`` are not added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cl_bench.artifacts import models
from cl_bench.contracts.strategy import Strategy
from cl_bench.data.experience import Experience
from cl_bench.data.stream import Transform
from cl_bench.errors import refusing
from cl_bench.loop.snapshot import restore
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.results.result import FILE_NAME, Result
from cl_bench.results.result import read as read_result
from cl_bench.run import configs
from cl_bench.run.configuration import Configuration, resolve
from cl_bench.run.run import quiet


@dataclass(frozen=True, eq=False)
class Loaded:
    """A strategy as it was after an experience, in evaluation mode, with all that a prediction needs.

    Attributes:
        strategy: The method.
        transform: From an image, as the dataset decodes it, to pixels (3, H, W) in [0, 1]: the test transform
            of the protocol. Image files are decoded to Pillow images in RGB, other datasets hold uint8
            tensors (3, H, W).
        class_names: Name of each class seen; a logit has the place of its class.
        experience: Index of the experience, from 0.
        result: The result of the run.
        configuration: Its configuration, for the device at hand.
        trainer: Gives device and precision.
    """

    strategy: Strategy
    transform: Transform
    class_names: list[str]
    experience: int
    result: Result
    configuration: Configuration
    trainer: StreamTrainer

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Map transformed images (B, 3, H, W) to logits (B, classes seen), in the precision of the run."""
        plugin = self.trainer.precision_plugin
        with plugin.forward_context():
            logits: Tensor = self.strategy(plugin.convert_input(images.to(self.strategy.device)))
        return logits

    def predict(self, images: Sequence[object]) -> list[str]:
        """Return the name of the class predicted for each of ``images``, as the dataset decodes them."""
        logits = self(torch.stack([self.transform(image) for image in images]))
        return [self.class_names[place] for place in logits.argmax(dim=1).tolist()]


def load(
    cell: str | Path, experience: int | None = None, *, device: str = "cpu", weights: str | None = None
) -> Loaded:
    """Return the strategy of a cell that was run with ``--keep model`` or ``--keep all``.

    Args:
        cell: Folder of the cell.
        experience: Index, from 0, of the experience after which the model was kept; the last if None.
        device: ``cpu``, ``cuda`` or ``mps``.
        weights: File of the pre-trained weights, if it is no longer where the config says.

    Raises:
        FileNotFoundError: If the cell has no such kept model, or its pre-trained weights are missing.
        ValueError: If result, config and model do not belong together, or a class cannot be imported.
    """
    folder = Path(cell)
    result = read_result(folder / FILE_NAME)
    after = _after(folder, result, experience)
    configuration = _configuration(folder, result, device, weights)
    origin, snapshot = models.read(models.file_of(folder, after))
    with quiet(), refusing(), torch.random.fork_rng(devices=[]):  # what is drawn is replaced
        strategy, trainer = configuration.build([], [])
        trainer.precision_plugin.convert_module(strategy)
        for seen in _experiences(result, after):
            strategy.expand(seen)
    path = f"{type(strategy).__module__}.{type(strategy).__qualname__}"
    expected = models.Origin(result.cell, path, strategy.backbone.weights_sha256, after)
    if origin != expected:
        raise ValueError(
            f"The model {models.file_of(folder, after)} is of {origin}, and this cell has {expected}: "
            "give the weights that it was trained from, or run the cell again with --keep model."
        )
    with refusing():
        restore(strategy, snapshot)
    trainer.set_precision(strategy)
    strategy.to(trainer.strategy.root_device).eval()
    names = result.class_names[: result.experiences[after][1]]
    transform = configuration.datamodule.test_transform()
    return Loaded(strategy, transform, names, after, result, configuration, trainer)


def _after(folder: Path, result: Result, experience: int | None) -> int:
    """Return the index of the experience to load, once a model is known to be kept after it."""
    length = result.num_experiences
    kept = [index for index in range(length) if models.file_of(folder, index).is_file()]
    if not kept:
        raise FileNotFoundError(
            f"{folder} has no model: remove the folder and run its cell again with --keep model."
        )
    wanted = length - 1 if experience is None else experience
    if wanted not in kept:
        raise FileNotFoundError(
            f"{folder} has no model after experience {wanted}, counted from 0: choose among "
            f"{', '.join(map(str, kept))}."
        )
    return wanted


def _configuration(folder: Path, result: Result, device: str, weights: str | None) -> Configuration:
    """Return the configuration of a cell for one process on ``device``."""
    config = configs.load(folder / "config.yaml")
    config.pop("code", None)  # folders of code are not imported from
    words = [f"--trainer.accelerator={'gpu' if device == 'cuda' else device}", "--trainer.strategy=auto"]
    words += ["--trainer.devices=1", "--trainer.num_nodes=1"]
    if weights is not None:
        words.append(f"--backbone.weights={weights}")
    try:
        configuration = resolve([config], words)
    except ValueError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        raise ValueError(
            f"The config in {folder} cannot be used: {error} If you trust its class, make it importable, for "
            "example with PYTHONPATH."
        ) from error
    if configuration.hash != result.cell:
        raise ValueError(
            f"The config in {folder} is of the cell {configuration.hash}, and its result of {result.cell}: "
            "give the weights that it was trained from, or restore both files as the run wrote them."
        )
    return configuration


def _experiences(result: Result, after: int) -> list[Experience]:
    """Return the experiences that the strategy has seen."""
    names = tuple(result.class_names)
    if result.regime == "joint":
        return [Experience(0, 1, range(len(names)), names)]
    spans = result.experiences[: after + 1]
    return [
        Experience(index, result.num_experiences, range(start, stop), names[start:stop])
        for index, (start, stop) in enumerate(spans)
    ]
