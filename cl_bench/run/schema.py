"""What a configuration may contain: the ``__init__`` signatures of its classes, read by LightningCLI.

A wrong key or value becomes one sentence that names the nearest valid one.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.contracts.strategy import Strategy
from cl_bench.errors import nearest
from cl_bench.loop.checkpoint import EVERY
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.network.backbones import Backbone
from cl_bench.results.result import Regime

Config = dict[str, Any]

GROUPS = ("model", "data", "backbone", "trainer")

_MOST_THREADS = 256  # beyond what a machine has room for, OpenMP ends the process without a word

_SWITCHES = ("wandb", "diagnostics", "resume")  # may stand without a value

# Arguments that are set under another key.
_LINKS = {"model.backbone": "backbone", "data.seed": "seed", "data.order": "order"}


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
        parser.add_argument("--wandb", type=bool, default=False, help="Log to Weights & Biases as well.")
        parser.add_argument(
            "--diagnostics",
            type=bool,
            default=False,
            help="Measure inside the model after every experience; no count changes.",
        )
        parser.add_argument(
            "--resume",
            type=bool,
            default=True,
            help="Go on where an earlier attempt at this cell was cut off; false starts anew.",
        )
        parser.add_argument(
            "--checkpoint_every",
            type=float,
            default=EVERY,
            help="Seconds after a checkpoint from which on the end of an epoch writes another.",
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
        text = re.sub(r", --\S+\+ \S+", "", parser.format_help())  # how jsonargparse appends to a list
        return re.sub(r"(?m)^  --\w+ CONFIG .*\n", "", text)  # and how it reads a group from a file

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Start from the defaults; :meth:`parse` does the rest."""
        self.config = parser.get_defaults()

    def instantiate_classes(self) -> None:
        """Build nothing: a finished cell is never built."""

    def _set_seed(self) -> None:
        """Leave the generators alone: seeding belongs to the loop over experiences."""

    def parse(
        self, config: Config, overrides: Sequence[str], files: Mapping[str, Path] | None = None
    ) -> Namespace:
        """Return the values of a merged ``config`` with command-line ``overrides`` on top.

        Args:
            config: Groups of plain values; ``model`` and ``data`` hold arguments, not class paths.
            overrides: Words such as ``--model.rank 4``; a key may be written without its group where only one
                group has it, ``--rank 4``.
            files: The file that sets a key of ``config``, for the error that names it.

        Raises:
            ValueError: If a key or a value is not valid.
        """

        def in_config(key: str) -> str:
            file = (files or {}).get(".".join(key.split(".")[:2]))
            return f"{key} in {file}" if file else f"--{key}"

        for key in keys_of(config):
            self.full_key(key, in_config(key).removeprefix("--"))
        values = _parsed(lambda: self.parser.parse_object(config), in_config)
        words = self._with_full_keys(overrides)
        return _parsed(lambda: self.parser.parse_args(words, namespace=values), "--{}".format)

    @property
    def keys(self) -> list[str]:
        """Every key with its group, such as ``model.rank``."""
        hidden = {"help", "config", "print_config"}
        return [
            action.dest
            for action in self.parser._actions
            if action.dest not in hidden | _LINKS.keys() and not action.dest.endswith(".help")
        ]

    def full_key(self, key: str, said: str | None = None) -> str:
        """Return ``key`` with its group.

        Args:
            key: With or without its group.
            said: What an error calls it, where that is more than the key.

        Raises:
            ValueError: If there is no such key, or several groups have it.
        """
        plain = key.replace(".init_args.", ".")
        keys = self.keys
        if plain in keys or any(plain.startswith(f"{known}.") for known in keys if "." in known):
            return plain
        in_groups = [known for known in keys if "." in known and known.partition(".")[2] == plain]
        if len(in_groups) == 1:
            return in_groups[0]
        if in_groups:
            raise ValueError(f"The key {key} is ambiguous: write one of {', '.join(in_groups)}.")
        raise ValueError(f"There is no key {said or key}. {self._remedy(plain, keys)}")

    def _remedy(self, key: str, keys: list[str]) -> str:
        if key in _LINKS:
            return f"Did you mean {_LINKS[key]}?"
        for group, class_, base in (
            ("model", self._model_class, Strategy),
            ("data", self._datamodule_class, StreamDataModule),
        ):
            name = key.removeprefix(f"{group}.").partition(".")[0]
            if name not in GROUPS and name in inspect.signature(base).parameters:
                return f"Let {class_.__name__} take **kwargs and hand them to super().__init__."
        elsewhere = [
            module
            for group, base in (("strategies", Strategy), ("datamodules", StreamDataModule))
            for module in takers(key.removeprefix("model.").removeprefix("data."), group, base)
        ]
        if elsewhere:
            return f"It is a key of {', '.join(elsewhere)}."
        by_last_part = {known.rpartition(".")[2]: known for known in keys}
        match = nearest(key, keys) or by_last_part.get(nearest(key.rpartition(".")[2], by_last_part) or "")
        return f"Did you mean {match}?" if match else "The option --help lists the keys."

    def _with_full_keys(self, overrides: Sequence[str]) -> list[str]:
        words = []
        for word, following in zip(overrides, [*overrides[1:], "--"], strict=False):
            switch = word.removeprefix("--").removeprefix("no_")
            if word.startswith("--") and switch in _SWITCHES and following.startswith("--"):
                words.append(f"--{switch}={'false' if word.startswith('--no_') else 'true'}")
                continue
            if not word.startswith("--"):
                words.append(word)
                continue
            key, equals, value = word[2:].partition("=")
            full_key = self.full_key(key)
            if full_key == "backbone":  # its name alone, which takes the place of every setting
                others = {name: setting for name, setting in Backbone.named("").items() if name != "model"}
                words += [f"--backbone.{name}={_word(setting)}" for name, setting in others.items()]
                full_key = "backbone.model"
            if full_key in GROUPS:
                raise ValueError(f"--{full_key} is a group: set its keys one by one, as --{full_key}.KEY.")
            words.append(f"--{full_key}{equals}{value}")
        return words


def takers(key: str, package: str, base: type[Any]) -> list[str]:
    """Return the modules of ``package`` in which a class of the kind ``base`` takes the argument ``key``.

    >>> takers("label_order", "datamodules", StreamDataModule)
    ['imagenet_r']
    """
    found = []
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        try:
            module = importlib.import_module(f"{package}.{info.name}")
        except Exception:  # a broken file must not hide what is wrong with a key
            continue
        own = [
            value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__
        ]
        if any(inspect.isclass(value) and issubclass(value, base) and _takes(value, key) for value in own):
            found.append(info.name)
    return found


def _takes(class_: type[Any], key: str) -> bool:
    """Return whether a constructor of ``class_``, its own or one above it, names ``key``."""
    constructors = [vars(ancestor)["__init__"] for ancestor in class_.__mro__ if "__init__" in vars(ancestor)]
    return any(key in inspect.signature(constructor).parameters for constructor in constructors)


def keys_of(config: Config) -> list[str]:
    """Return the keys of the groups, one level deep; what lies below is checked against its own class."""
    keys = []
    for name, value in config.items():
        if name in GROUPS and isinstance(value, dict):
            keys += [f"{name}.{key}" for key in value]
        else:
            keys.append(name)
    return keys


def nearest_class(class_path: str) -> str | None:
    """Return the class spelt most like ``class_path`` in its module, or in torch.optim if it names none.

    >>> nearest_class("torch.optim.Sgd"), nearest_class("steplr")
    ('torch.optim.SGD', 'torch.optim.lr_scheduler.StepLR')
    """
    module_name, _, name = class_path.rpartition(".")
    paths = {}
    for searched in [module_name] if module_name else ["torch.optim", "torch.optim.lr_scheduler"]:
        try:
            module = importlib.import_module(searched)
        except (ImportError, TypeError, ValueError):
            continue
        for found in dir(module):
            if inspect.isclass(getattr(module, found)):
                paths[found.lower()] = f"{searched}.{found}"
    return paths.get(nearest(name.lower(), paths) or "")


def _parsed(parse: Callable[[], Namespace], named: Callable[[str], str]) -> Namespace:
    """Return the values that ``parse`` finds; ``named`` is what errors call a key."""
    try:
        values = parse()
    except ArgumentError as error:
        raise ValueError(_one_sentence(str(error), named)) from error
    if not 1 <= values.threads <= _MOST_THREADS:
        raise ValueError(f"{named('threads')} cannot be {values.threads}: expected 1 to {_MOST_THREADS}.")
    for key in ("setting", "data.name"):
        name = values.get(key)
        if name is not None and (name in ("", ".", "..") or "/" in name or "\\" in name):
            raise ValueError(
                f"{named(key)} cannot be {name!r}: it names a folder, so write a word without slashes."
            )
    return values


def _one_sentence(message: str, named: Callable[[str], str]) -> str:
    """Condense a parser's message, which spans many lines, to the key, the value and what was expected."""
    if without_value := re.search(r"argument --(\S+): expected one argument", message):
        return f"{named(without_value[1])} needs a value."
    if stray := re.search(r"unrecognized arguments: (.+)", message):
        return f"Nothing takes the value {stray[1]!r}: write every setting as --KEY VALUE."
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    if not key:
        return " ".join(message.split())
    if refused := re.search(r"Option '(\w+)' is not accepted", message):
        return f"{named(key)} has no argument {refused[1]!r}."
    value = re.search(r"(?m)(?:Got value|Given value): (.+?)(?:\. Got value.*)?$", message)
    expected = [name for line in re.findall(r"Expected (?:an? )?(.+)", message) if (name := _type_name(line))]
    if not set(expected) - {"null"} and (class_path := _refused_class(message)) is not None:
        return f"{named(key)} cannot be {class_path!r}: {_class_remedy(class_path, message)}"
    if value and expected:
        given = value[1]
        choices = re.findall(r"'([^']*)'", " ".join(expected))
        match = nearest(given, choices)
        return f"{named(key)} cannot be {given!r}: expected {' or '.join(dict.fromkeys(expected))}." + (
            f" Did you mean {match}?" if match else ""
        )
    return f"{named(key)}: {' '.join(re.sub('Parser key .*?:', '', message).split())}"


def _refused_class(message: str) -> str | None:
    """Return what a parser's message gives as the class that it could not use."""
    for pattern in (
        r"Expected a dot import path string: (.*)",
        r"Problem with given class_path '([^']*)'",
        r"Got value: Namespace\(class_path='([^']*)'",
        r"Expected a path but (.*) either",
    ):
        if found := re.search(pattern, message):
            return found[1]
    return None


def _class_remedy(class_path: str, message: str) -> str:
    if base := re.search(r"to be a subclass of <class '(\w+)'>", message):
        return f"it is no subclass of {base[1]}."
    match = nearest_class(class_path)
    return "there is no such class. " + (
        f"Did you mean {match}?" if match else "Write the import path of one, such as torch.optim.SGD."
    )


def _word(setting: Any) -> str:
    return "null" if setting is None else str(setting)


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
