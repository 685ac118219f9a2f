"""Optional measurements of what happens inside a model over a stream; they change no result.

After every experience, one pass over its training images, transformed as at test time, measures the second
moment of the inputs of every adapted layer, the mean feature of each class, and the angles between features
and prototypes. From these and the weights before and after, every experience gets an entry with

* ``violation``: how far the update of each adapted projection, ``ΔW`` (m, n), moves its outputs for the
  inputs ``X`` (N, n) of all earlier experiences. ``absolute`` is ``‖ΔW Xᵀ‖_F``, which grows with the number
  of tokens N; ``relative`` is ``‖ΔW Xᵀ‖_F / (‖ΔW‖_F ‖X‖_F)``, in [0, 1], about ``1/√n`` for a random update.
* ``basis_dims``: how many directions the method protects for each adapted projection.
* ``danger_score``: mean cosine of a new feature to the nearest old prototype.
* ``angular``: for up to 256 images, evenly spread, that cosine and the cosine to the mean of their own class.
  Prototypes are the mean features of old classes, measured when these had just been learnt.
* ``held_out_ncm``: accuracy of the nearest class mean on classes outside the stream, a fraction, with the
  backbone before the experience and after it. It shows how much of the pre-training an experience destroys.
  The datamodule's ``held_out_classes`` sets their number. For each, at most 32 training images form the mean,
  and at most 32 test images are classified.

Source: the violation score, the danger score and its scatter are diagnostics of JANUS-LoRA,
https://arxiv.org/abs/2605.28495, which does not state over how many inputs its norm is taken; the scale-free
form is ours. KeepLoRA, https://arxiv.org/abs/2601.19659, calls accuracy outside the stream forward stability,
and measures it by the text encoder of CLIP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.contracts.low_rank import memory_of
from cl_bench.contracts.strategy import Strategy
from cl_bench.loop.callbacks import at_rest, on_device, strategy_of
from cl_bench.loop.progress import stream_of
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.maths.losses import cosine_similarities, danger_score
from cl_bench.maths.violation import null_space_violation, scale_free_violation
from cl_bench.measure.means import ClassMeans, class_means
from cl_bench.measure.moments import SecondMoments
from cl_bench.measure.passes import Statistic, measure
from cl_bench.network.adapters import AdaptedLinear
from cl_bench.network.heads import Prototypes
from cl_bench.processes.ranks import of_all, total

POINTS = 256
"""Largest number of images whose two angles are kept for each experience."""


class Diagnostics(Callback):
    """Adds an entry to ``result.diagnostics`` after every experience, and its means to the loggers.

    It costs one forward pass over the training images of an experience and one over the held-out images, both
    counted as the phase ``diagnostics``: 6 to 9 % of the training of LoRA on digits, with five epochs and
    nothing held out. It changes no counts, parameters or random numbers.
    """

    def __init__(self) -> None:
        self._layers: list[_Adapted] = []
        self._known: _Known | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Measure the model before the first experience, unless a checkpoint has the measurements."""
        strategy, stream = strategy_of(pl_module), stream_of(trainer)
        if stage != "fit":
            return
        assert isinstance(trainer, StreamTrainer)
        strategy.to(trainer.strategy.root_device)  # as Lightning is about to do
        self._layers = _adapted_layers(strategy)
        if self._known is not None:
            self._known.to(strategy.device)
            return
        if not stream.experience.is_first:
            raise ValueError(
                "This run was started without diagnostics, so it cannot be resumed with them. Drop "
                "--diagnostics, or restart with --resume=false."
            )
        with _diagnosing(trainer, strategy):
            self._known = _Known(
                weights=_weights(self._layers),
                past=[_Past() for _ in self._layers],
                prototypes=torch.zeros(0, strategy.backbone.feature_dim, device=strategy.device),
                outside=_held_out_accuracy(trainer, strategy, stream),
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the measurements of earlier experiences; nothing before the first."""
        if self._known is None:
            return {}
        return {name: value for name, value in vars(self._known).items() if name != "past"} | {
            "past": [vars(past) for past in self._known.past]
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the measurements of an earlier attempt."""
        past = [_Past(**entry) for entry in state_dict["past"]]
        self._known = _Known(**state_dict | {"past": past})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the model after an experience."""
        strategy, stream = strategy_of(pl_module), stream_of(trainer)
        assert isinstance(trainer, StreamTrainer)
        with _diagnosing(trainer, strategy):
            entry = self._entry(trainer, strategy, stream)
        trainer.result.diagnostics.append(entry)
        values = {"stream/experience": float(stream.experience.index + 1)} | scalars(entry)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def _entry(self, trainer: StreamTrainer, strategy: Strategy, stream: StreamDataModule) -> dict[str, Any]:
        known = self._known
        assert known is not None
        violation = self._violation(known)
        means, angles = ClassMeans(stream.experience.classes), _Angles(known.prototypes)
        moments = self._moments()
        batches = on_device(trainer, stream.plain_dataloader())
        measure(strategy.features, batches, means, angles, *moments.values())
        for index, past in enumerate(known.past):
            past.add(*_of_layer(moments, self._layers, index))
        centres = means.mean()
        angles.gather()
        danger, angular = angles.mean(), angles.points(centres, stream.experience.classes.start)
        known.prototypes = torch.cat([known.prototypes, centres])
        before, known.outside = known.outside, _held_out_accuracy(trainer, strategy, stream)
        return {
            "basis_dims": None if (memory := memory_of(strategy)) is None else memory.dims,
            "violation": violation,
            "danger_score": danger,
            "angular": angular,
            "held_out_ncm": None if before is None else {"before": before, "after": known.outside},
        }

    def _violation(self, known: _Known) -> dict[str, list[dict[str, float]]]:
        """Return the violations of the update since the last call, by projection and block."""
        found: dict[str, list[dict[str, float]]] = {}
        before, known.weights = known.weights, _weights(self._layers)
        for layer, past, old, new in zip(self._layers, known.past, before, known.weights, strict=True):
            if not past.tokens:
                continue
            assert past.sums is not None
            moment = past.sums / past.tokens
            for target, rows in layer.targets.items():
                update = new[rows] - old[rows]
                absolute = null_space_violation(update, moment, past.tokens)
                relative = scale_free_violation(update, moment)
                found.setdefault(target, []).append(
                    {"absolute": float(absolute), "relative": float(relative)}
                )
        return found

    def _moments(self) -> dict[int, SecondMoments]:
        """Return one statistic for each width of inputs."""
        widths: dict[int, list[AdaptedLinear]] = {}
        for one in self._layers:
            widths.setdefault(one.layer.weight.shape[1], []).append(one.layer)
        return {width: SecondMoments(layers) for width, layers in widths.items()}


def scalars(entry: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of one entry that are logged as curves, by name; means over layers for each target.

    >>> entry = {"basis_dims": [3, 5], "violation": {}, "danger_score": None, "angular": None}
    >>> scalars(entry | {"held_out_ncm": {"before": 0.5, "after": 0.25}})
    {'diagnostics/basis_dims': 4.0, 'retention/held_out_ncm': 0.25}
    """
    values = {}
    if entry["basis_dims"]:
        values["diagnostics/basis_dims"] = sum(entry["basis_dims"]) / len(entry["basis_dims"])
    for target, by_layer in entry["violation"].items():
        for form in ("absolute", "relative"):
            values[f"diagnostics/violation/{target}/{form}"] = sum(one[form] for one in by_layer) / len(
                by_layer
            )
    if entry["danger_score"] is not None:
        values["diagnostics/danger_score"] = entry["danger_score"]
    if entry["held_out_ncm"] is not None:
        values["retention/held_out_ncm"] = entry["held_out_ncm"]["after"]
    return values


@dataclass(frozen=True)
class _Adapted:
    """An adapted layer, and the rows of each of its projections that carries an adapter."""

    layer: AdaptedLinear
    targets: dict[str, slice]


@dataclass
class _Past:
    """Inputs of a layer in all earlier experiences: ``XᵀX`` (n, n) in float64, and the number of tokens."""

    sums: Tensor | None = None
    tokens: int = 0

    def add(self, sums: Tensor, tokens: int) -> None:
        self.sums = sums if self.sums is None else self.sums + sums
        self.tokens += tokens


@dataclass
class _Known:
    """Measurements so far: adapted weights, inputs, prototypes, and accuracy outside the stream."""

    weights: list[Tensor]
    past: list[_Past]
    prototypes: Tensor
    outside: float | None

    def to(self, device: torch.device) -> None:
        self.weights = [weight.to(device) for weight in self.weights]
        self.prototypes = self.prototypes.to(device)
        for past in self.past:
            past.sums = None if past.sums is None else past.sums.to(device)


class _Angles(Statistic):
    """Cosines of features to the nearest old prototype (P, d), and some features with their labels."""

    def __init__(self, prototypes: Tensor) -> None:
        self._prototypes = prototypes
        self._sum, self._count, self._stride = 0.0, 0, 1
        self._kept: list[tuple[Tensor, int]] = []

    def add(self, features: Tensor, labels: Tensor) -> None:
        if not len(self._prototypes) or not len(features):
            return
        self._sum += float(danger_score(features, self._prototypes)) * len(features)
        for feature, label in zip(features, labels.tolist(), strict=True):
            if self._count % self._stride == 0:
                self._kept.append((feature.clone(), label))
            self._count += 1
        self._thin()

    def gather(self) -> None:
        """Add the features of the other processes."""
        seen = of_all((self._sum, self._count, [(kept.cpu(), label) for kept, label in self._kept]))
        self._sum, self._count = sum(one[0] for one in seen), sum(one[1] for one in seen)
        self._kept = [(kept.to(self._prototypes), label) for one in seen for kept, label in one[2]]
        self._thin()

    def _thin(self) -> None:
        while len(self._kept) > POINTS:
            self._kept, self._stride = self._kept[::2], 2 * self._stride

    def mean(self) -> float | None:
        """Return the danger score, None without old prototypes."""
        return self._sum / self._count if self._count else None

    def points(self, centres: Tensor, first: int) -> dict[str, list[float]] | None:
        """Return both cosines of the kept features.

        Args:
            centres: Mean features (C, d) of the new classes.
            first: Position of the first new class.
        """
        if not self._kept:
            return None
        features = torch.stack([feature for feature, _ in self._kept])
        own = torch.tensor([label - first for _, label in self._kept], device=features.device)
        to_centres = cosine_similarities(features, centres).gather(1, own[:, None])[:, 0]
        to_old = cosine_similarities(features, self._prototypes).amax(dim=1)
        return {"nearest_old": to_old.tolist(), "own_centre": to_centres.tolist()}


def _adapted_layers(strategy: Strategy) -> list[_Adapted]:
    return [
        _Adapted(module, _targets(name, module))
        for name, module in strategy.backbone.named_modules()
        if isinstance(module, AdaptedLinear)
    ]


def _targets(name: str, layer: AdaptedLinear) -> dict[str, slice]:
    """Return the rows of each projection that carries an adapter; a fused layer has three projections."""
    if not name.endswith("attn.qkv"):
        return {name.rpartition(".")[2]: slice(0, layer.weight.shape[0])}
    third = layer.weight.shape[0] // 3
    projections = {target: slice(i * third, (i + 1) * third) for i, target in enumerate("qkv")}
    return {
        target: rows
        for target, rows in projections.items()
        if any(own.start < rows.stop and rows.start < own.stop for own in layer.rows.values())
    }


def _weights(layers: list[_Adapted]) -> list[Tensor]:
    """Return copies of the weights with their adapters, in float64, since updates are small differences."""
    return [one.layer.effective_weight().double() for one in layers]


def _of_layer(moments: dict[int, SecondMoments], layers: list[_Adapted], index: int) -> tuple[Tensor, int]:
    """Return ``XᵀX`` and the number of tokens that the layer at ``index`` has seen."""
    width = layers[index].layer.weight.shape[1]
    place = sum(1 for one in layers[:index] if one.layer.weight.shape[1] == width)
    return total(moments[width].products()[place]), int(total(moments[width].tokens[place]))


def _held_out_accuracy(trainer: StreamTrainer, strategy: Strategy, stream: StreamDataModule) -> float | None:
    """Return the accuracy of the nearest class mean on the held-out classes, None without any."""
    loaders = stream.held_out_dataloaders()
    if loaders is None:
        return None
    train, test = loaders
    classes = range(stream.held_out_classes)
    nearest = Prototypes(strategy.backbone.feature_dim, "euclidean").to(strategy.device)
    nearest.grow(len(classes))
    nearest.write(class_means(strategy.features, on_device(trainer, train), classes), classes)
    right = total = 0
    for images, labels in on_device(trainer, test):
        right += int((nearest(strategy.features(images)).argmax(dim=1) == labels).sum())
        total += len(labels)
    return right / total


@contextmanager
def _diagnosing(trainer: StreamTrainer, strategy: Strategy) -> Iterator[None]:
    """No gradients, layers in evaluation mode, random numbers restored; seconds count as diagnostics."""
    devices = [strategy.device] if strategy.device.type == "cuda" else []
    with trainer.course.timed("diagnostics"), at_rest(strategy), torch.random.fork_rng(devices):
        yield
