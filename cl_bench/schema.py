"""What a configuration may contain: the ``__init__`` signatures of its classes, read by LightningCLI.

A wrong key or value becomes one sentence that names the nearest valid one.
"""

from __future__ import annotations

import re
from argparse import ArgumentError
from collections.abc import Sequence
from typing import Any

from jsonargparse import ActionYesNo, Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from cl_bench.backbones import Backbone
from cl_bench.datamodule import StreamDataModule
from cl_bench.results import Regime
from cl_bench.spelling import nearest
from cl_bench.strategy import Strategy
from cl_bench.trainer import StreamTrainer

Config = dict[str, Any]


class Schema(LightningCLI):
    """The arguments of one strategy class on one datamodule class; it parses, and builds nothing by itself.

    Args:
        strategy: Class whose arguments are the group ``model``.
        datamodule: Class whose arguments are the group ``data``.
    """

    def __init__(self, strategy: type[Strategy], datamodule: type[StreamDataModule]) -> None:
        super().__init__(
            strategy,
            datamodule,
            trainer_class=StreamTrainer,
            run=False,
            save_config_callback=None,  # Lightning's callback refuses to run the same command twice
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"exit_on_error": False},
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what belongs to a run and to none of its classes."""
        parser.add_argument("--seed", type=int, default=1, help="Seed of all randomness but the class order.")
        parser.add_argument(
            "--order",
            type=str | list[int],
            default="identity",
            help="Class order: identity, numpy:SEED, python:SEED, or a list of classes.",
        )
        parser.add_argument(
            "--regime",
            type=Regime,
            default="sequential",
            help="sequential, or joint: one experience of all classes, as an upper bound.",
        )
        parser.add_argument(
            "--threads", type=int, default=1, help="CPU threads; part of the cell, since sums depend on it."
        )
        parser.add_argument("--results", type=str, default="results", help="Folder of all results.")
        parser.add_argument(
            "--setting", type=str | None, default=None, help="Name of this setting, in paths and tables."
        )
        parser.add_argument(
            "--wandb", action=ActionYesNo, default=False, help="Log to Weights & Biases as well."
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add backbone, trainer, strategy and datamodule."""
        parser.add_class_arguments(Backbone, "backbone")
        super().add_core_arguments_to_parser(parser)
        parser.link_arguments("backbone", "model.backbone", apply_on="instantiate")
        parser.link_arguments("seed", "data.seed")
        parser.link_arguments("order", "data.order")

    def help(self) -> str:
        """Return the arguments of this pair as readable text, without those of Lightning's Trainer."""
        parser = LightningArgumentParser(
            prog="cl-bench run",
            usage="cl-bench run STRATEGY DATASET [--KEY VALUE ...]",
            description="A key may be written without its group where only one group has it: --rank 4.",
            epilog=(
                "Every argument of lightning.Trainer is --trainer.KEY, such as --trainer.max_epochs 5, "
                "--trainer.precision bf16-mixed, --trainer.accelerator gpu, --trainer.gradient_clip_val 1."
            ),
        )
        self.add_default_arguments_to_parser(parser)
        parser.add_class_arguments(self._model_class, "model", skip={"backbone"})
        parser.add_class_arguments(self._datamodule_class, "data", skip={"seed", "order"})
        parser.add_class_arguments(Backbone, "backbone")
        return parser.format_help()

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Start from the defaults; :meth:`parse` does the rest."""
        self.config = parser.get_defaults()

    def instantiate_classes(self) -> None:
        """Build nothing: a finished cell is never built."""

    def _set_seed(self) -> None:
        """Leave the generators alone: seeding belongs to the loop over experiences."""

    def parse(self, config: Config, overrides: Sequence[str]) -> Namespace:
        """Return the values of a merged ``config`` with command-line ``overrides`` on top.

        Args:
            config: Groups of plain values; ``model`` and ``data`` hold arguments, not class paths.
            overrides: Words such as ``--model.rank 4``; a key may be written without its group where only one
                group has it, ``--rank 4``.

        Raises:
            ValueError: If a key or a value is not valid.
        """
        for key in _keys(config):
            self.full_key(key)
        try:
            values = self.parser.parse_object(config)
            return self.parser.parse_args(self._with_full_keys(overrides), namespace=values)
        except ArgumentError as error:
            raise ValueError(_one_sentence(str(error))) from error

    @property
    def keys(self) -> list[str]:
        """Every key with its group, such as ``model.rank``."""
        hidden = {"help", "config", "print_config"}
        return [
            action.dest
            for action in self.parser._actions
            if action.dest not in hidden and not action.dest.endswith(".help")
        ]

    def full_key(self, key: str) -> str:
        """Return ``key`` with its group.

        Raises:
            ValueError: If there is no such key, or several groups have it.
        """
        plain = key.replace(".init_args.", ".")
        keys = self.keys
        if plain in keys or any(plain.startswith(f"{known}.") for known in keys if "." in known):
            return plain
        in_groups = [known for known in keys if known.partition(".")[2] == plain]
        if len(in_groups) == 1:
            return in_groups[0]
        if in_groups:
            raise ValueError(f"The key {key} is ambiguous: write one of {', '.join(in_groups)}.")
        raise ValueError(f"There is no key {key}. {self._nearest(plain, keys)}")

    def _nearest(self, key: str, keys: list[str]) -> str:
        by_last_part = {known.rpartition(".")[2]: known for known in keys}
        match = nearest(key, keys) or by_last_part.get(nearest(key.rpartition(".")[2], by_last_part) or "")
        return f"Did you mean {match}?" if match else "The option --help lists the keys."

    def _with_full_keys(self, overrides: Sequence[str]) -> list[str]:
        words = []
        for word in overrides:
            if not word.startswith("--"):
                words.append(word)
                continue
            key, equals, value = word[2:].partition("=")
            negated = key.startswith("no_") and key[3:] in self.keys
            words.append(f"--{key if negated else self.full_key(key)}{equals}{value}")
        return words


def _keys(config: Config) -> list[str]:
    """Return the keys of the groups, one level deep; what lies below is checked against its own class."""
    keys = []
    for name, value in config.items():
        if name in ("model", "data", "trainer", "backbone") and isinstance(value, dict):
            keys += [f"{name}.{key}" for key in value]
        else:
            keys.append(name)
    return keys


def _one_sentence(message: str) -> str:
    """Condense a parser's message, which spans many lines, to the key, the value and what was expected."""
    without_value = re.search(r"argument (--\S+): expected one argument", message)
    if without_value:
        return f"{without_value[1]} needs a value."
    key = re.search(r'Parser key "([^"]+)"', message)
    refused = re.search(r"Option '(\w+)' is not accepted", message)
    if key and refused:
        return f"--{key[1]} has no argument {refused[1]!r}."
    value = re.search(r"(?:Got value|Given value): (.+)", message)
    expected = [name for line in re.findall(r"Expected (?:an? )?(.+)", message) if (name := _type_name(line))]
    if key and value and expected:
        given = value[1]
        choices = re.findall(r"'([^']*)'", " ".join(expected))
        match = nearest(given, choices)
        return f"--{key[1]} cannot be {given!r}: expected {' or '.join(dict.fromkeys(expected))}." + (
            f" Did you mean {match}?" if match else ""
        )
    return " ".join(message.replace("Parser key ", "--").split())


def _type_name(expectation: str) -> str | None:
    """Return the type that a line of a parser's message expects, as a user would write it.

    >>> _type_name("<class 'int'>. Got value: x")
    'int'
    >>> _type_name("typing.Literal['merge', 'shared']. Got value: x")
    "'merge' or 'shared'"
    """
    if literal := re.match(r"typing\.Literal\[(.+?)\]", expectation):
        return literal[1].replace(", ", " or ")
    if class_ := re.match(r"<class '(?:\w+\.)*(\w+)'>", expectation):
        return class_[1].replace("NoneType", "null")
    return None
