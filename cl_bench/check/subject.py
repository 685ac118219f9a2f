"""The strategy under check: how it is built, trained and observed, and what can be found about it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor

from cl_bench.check.stream import TinyStream
from cl_bench.contracts.strategy import Strategy
from cl_bench.data.experience import Experience
from cl_bench.errors import sentence
from cl_bench.loop.callbacks import at_rest
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import pooled
from cl_bench.processes.state import put
from cl_bench.run.configs import CONFIGS, Config
from cl_bench.run.configuration import Configuration, resolve

RANK = 4
"""Rank and inner size of adapters under check; a published one would fill the tiny transformer."""

LONG = 12
"""Number of experiences of the long stream, on which growth is measured."""

_LEARNING_RATE, _WEIGHT_DECAY = 0.01, 0.1

_seeds = count(12345)

State = dict[str, Tensor]


@dataclass(frozen=True)
class Moment:
    """What a strategy holds, and what it computes for the probe images, at one moment.

    Attributes:
        state: Copies of its parameters and persistent buffers.
        trained: Names of the parameters that require a gradient.
        frozen: Names of the parameters that do not.
        features: Of the probe images (N, d); (N, 0) if the first ``expand`` has yet to make what they need.
        logits: Of the probe images (N, classes seen).
        unready: The error of ``features`` before the first ``expand``; empty if it runs.
        constant: Outputs for the probe images of the map that is declared constant; features if none is.
    """

    state: State
    trained: frozenset[str]
    frozen: frozenset[str]
    features: Tensor
    logits: Tensor
    unready: str
    constant: Tensor


@dataclass
class Run:
    """A strategy and what it runs with.

    Attributes:
        strategy: The method; training changes it in place.
        trainer: Its trainer.
        stream: The tiny stream, set up.
        backbone: Arguments of the backbone.
    """

    strategy: Strategy
    trainer: StreamTrainer
    stream: TinyStream
    backbone: dict[str, Any]

    @property
    def experiences(self) -> Sequence[Experience]:
        """The experiences of the stream."""
        return self.stream.experiences

    def learn(self, experience: Experience) -> None:
        """Train on ``experience``."""
        self.trainer.learn(self.strategy, self.stream, experience)

    def pretrained(self) -> State:
        """Return the parameters of the backbone as the strategy received it."""
        return dict(Backbone(**self.backbone).named_parameters())

    def moment(self) -> Moment:
        """Observe the strategy, and leave it as it is."""
        images, _ = self.stream.probe()
        strategy = self.strategy
        parameters = dict(strategy.named_parameters())
        trained = frozenset(name for name, parameter in parameters.items() if parameter.requires_grad)
        state, unready = copied_state(strategy), ""
        features = constant = logits = images.new_empty(len(images), 0)
        if strategy.head.num_classes:
            features, logits = self._features(images), self.logits(images)
            queried = strategy.promises.constant == "query"
            constant = self._features(images, "query") if queried else features
        else:
            try:
                features = self._features(images)
            except Exception as error:  # a strategy may raise anything
                unready = sentence(error).rstrip(".")
        for name in differing(state, copied_state(strategy)):  # a method may learn from test images
            put(strategy, name, state.get(name))
        frozen = frozenset(parameters) - trained
        return Moment(state, trained, frozen, features, logits, unready, constant)

    def tested(self, images: Tensor, labels: Tensor, batch: int = 0) -> Tensor:
        """Return the logits (B, classes seen) of Lightning's test step for images with ``labels``."""
        with _at_test_time(self.strategy):
            logits: Tensor = self.strategy.test_step((images, labels), batch)
        return logits.clone()

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes seen) of images (B, 3, H, W) at test time."""
        with _at_test_time(self.strategy):
            logits: Tensor = self.strategy(images)
        return logits.clone()

    def _features(self, images: Tensor, name: str = "features") -> Tensor:
        with _at_test_time(self.strategy):
            return pooled(getattr(self.strategy, name)(images)).clone()


class Subject:
    """A strategy under check.

    Args:
        layer: Its config: a file, or the content of one.
        overrides: Options of the command line, such as ``--rank 2``.

    Raises:
        ValueError: If the config or an override is not valid.
        FileNotFoundError: If there is no such config.
    """

    def __init__(self, layer: Path | Config, overrides: Sequence[str] = ()) -> None:
        layers = [CONFIGS / "check.yaml", layer]
        given = resolve(layers, overrides)
        small = _small(given)
        self._configuration = resolve(layers, [*small, *overrides]) if small else given

    @property
    def strategy_class(self) -> type[Strategy]:
        """The method."""
        return self._configuration.strategy_class

    def backbone_options(self, **changes: Any) -> dict[str, Any]:
        """Return the options of the tiny transformer with ``changes``."""
        return dict(self._configuration.namespace.backbone.options) | changes

    def run(self, settings: Mapping[str, Any] | None = None, callbacks: Sequence[Callback] = ()) -> Run:
        """Build a new strategy with its own trainer and stream.

        Args:
            settings: Values that replace those of the config, such as 20 for ``data.num_experiences``.
            callbacks: Callbacks of the trainer.
        """
        values = self._configuration.namespace.clone()
        for key, value in (settings or {}).items():
            values[key] = value
        _stir()
        strategy, trainer = replace(self._configuration, namespace=values).build(list(callbacks), [])
        stream = TinyStream(**values.data.as_dict())
        trainer.require_fit(strategy, stream)
        return Run(strategy, trainer, stream, values.backbone.as_dict())


def _small(configuration: Configuration) -> list[str]:
    """Return the options that make a strategy fit the tiny transformer."""
    depth = configuration.namespace.backbone.options["depth"]
    keys = configuration.schema.keys
    small = {"rank": RANK, **configuration.strategy_class.small}
    words = [f"--model.{key}={size}" for key, size in small.items() if f"model.{key}" in keys]
    blocks = configuration.namespace.model.get("blocks")
    return words + (["--model.blocks", str([b for b in blocks if b < depth])] if blocks else [])


def strong(run: Run, weight_decay: float | None = _WEIGHT_DECAY) -> Run:
    """Raise learning rate and weight decay, so that whatever the optimizer can move moves visibly.

    Args:
        run: A run that has not begun.
        weight_decay: The decay, if the optimizer has one; as it is configured if None.
    """
    strategy = run.strategy
    build = strategy._optimizer

    def strengthened(parameters: Any) -> torch.optim.Optimizer:
        optimizer = build(parameters)
        for settings in (optimizer.defaults, *optimizer.param_groups):  # groups added later take the defaults
            settings["lr"] = max(settings["lr"], _LEARNING_RATE)
            if weight_decay is not None and "weight_decay" in settings:
                settings["weight_decay"] = weight_decay
        return optimizer

    strategy._optimizer = strengthened
    return run


@contextmanager
def called_around(
    strategy: Strategy,
    hook: str,
    *,
    before: Callable[[], None] | None = None,
    after: Callable[[], None] | None = None,
) -> Iterator[None]:
    """Call ``before`` and ``after`` around every call of the method ``hook`` of ``strategy``."""
    original = getattr(strategy, hook)

    def surrounded(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before()
        result = original(*args, **kwargs)
        if after is not None:
            after()
        return result

    setattr(strategy, hook, surrounded)
    try:
        yield
    finally:
        delattr(strategy, hook)


def copied_state(strategy: Strategy) -> State:
    """Return copies of the parameters and persistent buffers of ``strategy``."""
    state = strategy.state_dict().items()
    return {name: tensor.detach().clone() for name, tensor in state if isinstance(tensor, Tensor)}


def differing(one: State, other: State) -> list[str]:
    """Return the names of the tensors that are not bit-identical in two states.

    >>> differing({"a": torch.zeros(1), "b": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.ones(1)})
    ['b']
    """
    return [
        name
        for name in sorted(one.keys() | other.keys())
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    ]


def largest_change(one: Tensor, other: Tensor) -> float:
    """Return the largest change of an entry: 0 if there are none, infinity if the shapes differ."""
    if not one.numel():
        return 0.0
    if one.shape != other.shape:
        return math.inf
    return float((one - other).abs().nan_to_num(nan=math.inf).max())


def allowed(tolerance: float) -> str:
    """Return a tolerance in words."""
    return f"{tolerance:.0e}" if tolerance else "the same bits"


def some(names: Sequence[str], shown: int = 3) -> str:
    """Return the first ``shown`` names, and the number of the others."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def _at_test_time(strategy: Strategy) -> Iterator[None]:
    """Turn gradients off, set evaluation mode, and restore the random generators afterwards."""
    with at_rest(strategy), torch.random.fork_rng():
        yield


def _stir() -> None:
    """Seed the global generators in another way than for any earlier run."""
    seed = next(_seeds)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


class Broken(Exception):
    """A claim does not hold; the message names what was found and the remedy."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of checking one claim.

    Attributes:
        claim: The claim, in words.
        passed: Whether it holds.
        why: What was measured; or what was found instead, with the remedy.

    >>> print(Verdict("frozen parts stay frozen", passed=True, why="31 tensors, bit by bit"))
    passed  frozen parts stay frozen: 31 tensors, bit by bit
    """

    claim: str
    passed: bool
    why: str

    def __str__(self) -> str:
        """Return one line."""
        return f"{'passed' if self.passed else 'FAILED'}  {self.claim}: {self.why}"
