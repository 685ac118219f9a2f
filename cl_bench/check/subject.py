"""The strategy under check: how it is built, trained on a tiny stream, and looked at."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
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
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import pooled
from cl_bench.run.configuration import CONFIGS, Configuration, resolve
from cl_bench.run.schema import Config

RANK = 4
"""Rank of the adapters of a strategy that has one; a published rank would fill the tiny transformer."""

LONG = 20
"""Number of experiences of the long stream, on which cost must not grow."""

_LEARNING_RATE, _WEIGHT_DECAY = 0.01, 0.1

_seeds = count(12345)

State = dict[str, Tensor]


@dataclass(frozen=True)
class Moment:
    """What a strategy is, and what it does with the probe images, at one moment.

    Attributes:
        state: Copies of its parameters and persistent buffers.
        trained: Names of the parameters with a gradient.
        features: Of the probe images (N, d).
        logits: Of the probe images (N, classes seen), without a column before the first experience.
    """

    state: State
    trained: frozenset[str]
    features: Tensor
    logits: Tensor


@dataclass
class Run:
    """A strategy and what it runs with.

    Attributes:
        strategy: As it was built, and after training as it was left.
        trainer: Lightning's, for a stream.
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
        """Return the parameters of the backbone before the strategy had it."""
        return dict(Backbone(**self.backbone).named_parameters())

    def moment(self) -> Moment:
        """Look at the strategy; it stays as it is."""
        images = self.stream.probe()[0]
        with _at_test_time(self.strategy):
            features = pooled(self.strategy.features(images)).clone()
            seen = self.strategy.head.num_classes
            logits = self.strategy(images).clone() if seen else features.new_zeros(len(images), 0)
        trained = frozenset(n for n, p in self.strategy.named_parameters() if p.requires_grad)
        return Moment(copied_state(self.strategy), trained, features, logits)

    def tested(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return what the test step of Lightning answers to images with ``labels``."""
        with _at_test_time(self.strategy):
            answer: Tensor = self.strategy.test_step((images, labels), 0)
        return answer

    def logits(self, images: Tensor) -> Tensor:
        """Return what the strategy answers to images (B, 3, H, W) at test time, (B, classes seen)."""
        with _at_test_time(self.strategy):
            answer: Tensor = self.strategy(images)
        return answer


class Subject:
    """A strategy under check.

    Args:
        layer: Its config: a file, or its content.
        overrides: Words of the command line, such as ``--rank 2``.

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

    def run(self, settings: Mapping[str, Any] | None = None, callbacks: Sequence[Callback] = ()) -> Run:
        """Build the strategy anew, with a trainer and a stream of their own.

        Args:
            settings: Values in place of those of the config, such as 20 for ``data.num_experiences``.
            callbacks: Watchers of the training.
        """
        values = self._configuration.namespace.clone()
        for key, value in (settings or {}).items():
            values[key] = value
        _stir()
        strategy, trainer = replace(self._configuration, namespace=values).build(list(callbacks), [])
        stream = TinyStream(**values.data.as_dict())
        trainer.require_fit(strategy, stream)
        return Run(strategy, trainer, stream, values.backbone.as_dict())

    @cached_property
    def fresh(self) -> Run:
        """The strategy before its first experience."""
        return self.run()


def _small(configuration: Configuration) -> list[str]:
    """Return the settings that make a strategy fit into the tiny transformer."""
    depth = configuration.namespace.backbone.options["depth"]
    words = ["--model.rank", str(RANK)] if "model.rank" in configuration.schema.keys else []
    blocks = configuration.namespace.model.get("blocks")
    return words + (["--model.blocks", str([b for b in blocks if b < depth])] if blocks else [])


def strong(run: Run) -> Run:
    """Let the optimizer move and decay whatever it holds, so that what should not move is seen to."""
    strategy = run.strategy
    build = strategy._optimizer

    def strengthened(parameters: Any) -> torch.optim.Optimizer:
        optimizer = build(parameters)
        for group in optimizer.param_groups:
            group["lr"] = max(group["lr"], _LEARNING_RATE)
            if "weight_decay" in group:
                group["weight_decay"] = _WEIGHT_DECAY
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
    """Return the names under which two states do not hold the same bits.

    >>> differing({"a": torch.zeros(1), "b": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.ones(1)})
    ['b']
    """
    return [
        name
        for name in sorted(one.keys() | other.keys())
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    ]


def some(names: Sequence[str], shown: int = 3) -> str:
    """Return the first of ``names`` and how many more there are."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def _at_test_time(strategy: Strategy) -> Iterator[None]:
    """No gradients, layers in evaluation mode, random numbers left as they were."""
    modes = [(module, module.training) for module in strategy.modules()]
    strategy.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _stir() -> None:
    """Leave the global generators in another state than any run before."""
    seed = next(_seeds)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


class Broken(Exception):
    """A claim does not hold; the message says what was found and what to do."""


@dataclass(frozen=True)
class Verdict:
    """What was found about one claim.

    Attributes:
        claim: What is claimed, in words.
        passed: Whether it holds.
        why: What was measured, or what broke it and the remedy.

    >>> print(Verdict("frozen parts stay frozen", passed=True, why="31 tensors, bit by bit"))
    passed  frozen parts stay frozen: 31 tensors, bit by bit
    """

    claim: str
    passed: bool
    why: str

    def __str__(self) -> str:
        """Return one line."""
        return f"{'passed' if self.passed else 'FAILED'}  {self.claim}: {self.why}"
