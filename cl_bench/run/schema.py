"""What a configuration may contain: the ``__init__`` signatures of its classes, read by jsonargparse.

A wrong key or value becomes one sentence that names the nearest valid one.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from cl_bench.artifacts.keeping import Keep
from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.contracts.strategy import Strategy
from cl_bench.errors import nearest
from cl_bench.loop.checkpoint import EVERY
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.network.backbones import Backbone
from cl_bench.results.result import Regime
from cl_bench.results.tuning import read
from cl_bench.run.configs import GROUPS, Config, require_tree

WANDB = {
    "project": "W&B project (default: WANDB_PROJECT, then cl-bench).",
    "entity": "W&B user or team of the project (default: yours).",
    "group": "Group of the W&B run (default: the benchmark).",
    "name": "Name of the W&B run (default: strategy and cell).",
}
"""Settings of a W&B run that are texts; their keys begin with ``wandb_``."""

_MOST_THREADS = 256  # with more than the machine can start, OpenMP kills the process without a message

_SWITCHES = ("wandb", "tensorboard", "diagnostics", "keep_logits", "resume")  # need no value

# Arguments that are set under another key, and the keys of options that other codebases have.
_LINKS = {"model.backbone": "backbone", "data.seed": "seed", "data.order": "order"}
_MEANT = {
    **dict.fromkeys(("lr", "learning_rate"), "optimizer.lr"),
    **dict.fromkeys(("weight_decay", "wd"), "optimizer.weight_decay"),
    "momentum": "optimizer.momentum",
    "optim": "optimizer",
    "lr_scheduler": "scheduler",
    **dict.fromkeys(("epochs", "num_epochs"), "max_epochs"),
    **dict.fromkeys(("bs", "batch"), "batch_size"),
    "workers": "num_workers",
    **dict.fromkeys(("tasks", "num_tasks"), "num_experiences"),
    "img_size": "image_size",
    "device": "accelerator",
    "gpus": "devices",
    **dict.fromkeys(("output", "output_dir"), "results"),
    **dict.fromkeys(("data_dir", "data_root"), "root"),
    "pretrained": "backbone.weights",
    "amp": "precision",
}

# Lines of jsonargparse's messages that start like this contain no reason.
_FRAME = (
    "Does not validate against",
    "Errors:",
    "Expected a dot import path",
    "Expected a path but",
    "Given value",
    "Not a valid subclass",
    "Subclass types",
    "Subtypes:",
    "a class path (str)",
    "a dict with",
)


class Schema:
    """The arguments of one strategy class on one datamodule class.

    Args:
        strategy: Class whose arguments are the group ``model``.
        datamodule: Class whose arguments are the group ``data``.

    Attributes:
        parser: The parser of these arguments. It instantiates classes that are arguments, such as the
            optimizer, but not strategy, datamodule, backbone and trainer.
    """

    def __init__(self, strategy: type[Strategy], datamodule: type[StreamDataModule]) -> None:
        self._strategy, self._datamodule = strategy, datamodule
        self.parser = ArgumentParser(exit_on_error=False)
        _add_settings(self.parser)
        _add_group(self.parser, "backbone", Backbone)
        _add_group(self.parser, "trainer", StreamTrainer, skip={"logger"})  # wandb and tensorboard set it
        _add_group(self.parser, "model", strategy, skip={"backbone"})
        _add_group(self.parser, "data", datamodule)
        self.parser.link_arguments("seed", "data.seed")
        self.parser.link_arguments("order", "data.order")

    def help(self) -> str:
        """Return the arguments of this pair as readable text, without those of Lightning's Trainer."""
        parser = ArgumentParser(
            prog="cl-bench run",
            usage="cl-bench run STRATEGY DATASET [--KEY VALUE ...]",
            description="A key needs its group only if several groups have it: --rank 4 is --model.rank 4.",
            epilog=(
                "Every argument of lightning.Trainer is --trainer.KEY, such as --trainer.max_epochs 5, "
                "--trainer.precision bf16-mixed, --trainer.accelerator gpu, --trainer.gradient_clip_val 1."
            ),
        )
        _add_settings(parser)
        _add_group(parser, "model", self._strategy, skip={"backbone"})
        _add_group(parser, "data", self._datamodule, skip={"seed", "order"})
        _add_group(parser, "backbone", Backbone)
        text = re.sub(r", --\S+\+ \S+", "", parser.format_help())  # how jsonargparse appends to a list
        return re.sub(r"(?m)^  --\w+ CONFIG .*\n", "", text)  # and how it reads a group from a file

    def parse(
        self, config: Config, overrides: Sequence[str], files: Mapping[str, Path] | None = None
    ) -> Namespace:
        """Return the values of a merged ``config`` with ``overrides`` on top; the arguments are as below.

        Raises:
            ValueError: If a key or a value is not valid.
        """
        return self.overridden(self.parsed(config, files), overrides)

    def parsed(self, config: Config, files: Mapping[str, Path] | None = None) -> Namespace:
        """Return the values of a merged ``config``.

        Args:
            config: Groups of plain values; ``model`` and ``data`` hold arguments, not class paths.
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
        if values.tuned:
            self._require_as_tuned(Path(values.tuned), files or {})
        return values

    def _require_as_tuned(self, record: Path, files: Mapping[str, Path]) -> None:
        """Require that the file which names a record of cl-bench tune also sets what the study found."""
        file = files.get("tuned")
        if {files.get(f"{group}.class_path") for group in ("model", "data")} == {file}:
            return  # the config of a whole run
        for key in read(record).chosen:
            full = ".".join(self.full_key(key).split(".")[:2])
            if files.get(full) != file:
                raise ValueError(
                    f"tuned in {file} does not set {key}: give --tuned={record} on "
                    "the command line, which sets all that the study found."
                )

    def overridden(self, values: Namespace, overrides: Sequence[str]) -> Namespace:
        """Return ``values``, which are changed, with command-line ``overrides`` on top.

        Args:
            values: Parsed values.
            overrides: Words such as ``--model.rank 4``. A key needs its group only if several groups have it.

        Raises:
            ValueError: If a key or a value is not valid.
        """
        words = self._with_full_keys(overrides)
        parse = partial(self.parser.parse_args, words, namespace=values, defaults=False)  # values has them
        values = _parsed(parse, "--{}".format)
        of_wandb = [word.partition("=")[0] for word in words if word.startswith("--wandb_")]
        if of_wandb and not values.wandb:
            raise ValueError(f"{of_wandb[0]} has no effect without --wandb: add it.")
        for group in GROUPS:
            if group not in values:  # its class takes no arguments
                values[group] = Namespace()
        return values

    @cached_property
    def defaults(self) -> Namespace:
        """The values that the signatures set."""
        return self.parser.get_defaults()

    @cached_property
    def keys(self) -> list[str]:
        """Every key with its group, such as ``model.rank``."""
        hidden = {"help", *_LINKS}
        keys = [action.dest for action in self.parser._actions]
        return [key for key in keys if key not in hidden and not key.endswith(".help")]

    def full_key(self, key: str, name: str | None = None) -> str:
        """Return ``key`` with its group.

        Args:
            key: With or without its group.
            name: What an error calls the key, if not ``key``.

        Raises:
            ValueError: If the key does not exist, or several groups have it.
        """
        plain = key.replace(".init_args.", ".")
        keys = self.keys
        if plain in keys or any(plain.startswith(f"{known}.") for known in keys if "." in known):
            return plain
        first, dot, rest = plain.partition(".")  # as in optimizer.lr
        first = plain if first in GROUPS else first
        in_groups = [f"{known}{dot}{rest}" for known in keys if known.partition(".")[2] == first]
        if len(in_groups) == 1:
            return in_groups[0]
        if in_groups:
            raise ValueError(f"The key {key} is ambiguous: write one of {', '.join(in_groups)}.")
        raise ValueError(f"There is no key {name or key}. {self._remedy(plain, keys)}")

    def _remedy(self, key: str, keys: list[str]) -> str:
        group, _, last = key.rpartition(".")
        meant = _LINKS.get(key) or _MEANT.get(last if group in GROUPS else key)
        if meant and self._has(meant.partition(".")[0], keys):
            return f"Did you mean {meant}?"
        if key in ("strategy", "dataset", "config"):
            return "Name strategy and dataset before the options: cl-bench run STRATEGY DATASET."
        for group, class_, base in (
            ("model", self._strategy, Strategy),
            ("data", self._datamodule, StreamDataModule),
        ):
            name = key.removeprefix(f"{group}.").partition(".")[0]
            if name not in GROUPS and name in inspect.signature(base).parameters:
                return f"Let {class_.__name__} take **kwargs and pass them to super().__init__."
        by_last_part = {known.rpartition(".")[2]: known for known in keys}
        match = nearest(key, keys) or by_last_part.get(nearest(key.rpartition(".")[2], by_last_part) or "")
        return f"Did you mean {match}?" if match else "The option --help lists the keys."

    @staticmethod
    def _has(name: str, keys: list[str]) -> bool:
        """Whether ``name`` is a key with or without its group, or a group."""
        return name in GROUPS or any(name in (key, key.partition(".")[2]) for key in keys)

    def _with_full_keys(self, overrides: Sequence[str]) -> list[str]:
        """Return ``overrides`` as words ``--GROUP.KEY=VALUE``."""
        words, rest = [], list(overrides)
        while rest:
            word = rest.pop(0)
            if not word.startswith("--"):
                raise ValueError(f"No key takes the value {word!r}: write every setting as --KEY VALUE.")
            key, equals, value = word.removeprefix("--").partition("=")
            switch = key.removeprefix("no_")
            if not equals and rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif not equals and switch in _SWITCHES:
                key, value = switch, str(key == switch).lower()
            elif not equals:
                raise ValueError(f"--{self.full_key(key)} needs a value.")
            key = self.full_key(key)
            if "{" in value or "&" in value:
                with suppress(yaml.YAMLError):  # a text such as a&b
                    require_tree(value, f"--{key}")
            if key == "backbone":  # its name, which replaces every setting of the group
                value = json.dumps(Backbone.named(value))
            elif key in GROUPS:
                raise ValueError(f"--{key} is a group: set its keys one by one, as --{key}.KEY.")
            words.append(f"--{key}={value}")
        return words


@cache
def factors(seed: str, order: str) -> Config:
    """Return the values of seed and class order, given as words of the command line.

    Raises:
        ValueError: If one of them is not valid.

    >>> factors("3", "[1, 0]")
    {'seed': 3, 'order': [1, 0]}
    """
    parser = ArgumentParser(exit_on_error=False)
    _add_factors(parser)
    words = [f"--seed={seed}", f"--order={order}"]
    return dict(_parsed(lambda: parser.parse_args(words), "--{}".format).as_dict())


def keys_of(config: Config) -> list[str]:
    """Return the keys of ``config``, one level deep in groups; jsonargparse checks deeper keys."""
    keys = []
    for name, value in config.items():
        if name in GROUPS and isinstance(value, dict):
            keys += [f"{name}.{key}" for key in value]
        else:
            keys.append(name)
    return keys


def nearest_class(class_path: str) -> str | None:
    """Return the most similar class to ``class_path`` in its module, or in torch.optim if it has no module.

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


def _add_settings(parser: ArgumentParser) -> None:
    """Add the settings of a run that are not arguments of its classes."""
    _add_factors(parser)
    add = parser.add_argument
    add(
        "--regime",
        type=Regime,
        default="sequential",
        help="sequential, or joint: one experience of all classes, as an upper bound.",
    )
    add("--threads", type=int, default=1, help="CPU threads; part of the cell, since sums depend on them.")
    add("--results", type=str, default="results", help="Folder of all results.")
    add("--setting", type=str | None, default=None, help="Name of this setting, in paths and tables.")
    add(
        "--tuned",
        type=str | None,
        default=None,
        help="Record of cl-bench tune, whose best settings the run starts from.",
    )
    add("--wandb", type=bool, default=False, help="Log to Weights & Biases as well.")
    for name, meaning in WANDB.items():
        add(f"--wandb_{name}", type=str | None, default=None, help=meaning)
    add("--wandb_tags", type=list[str], default=[], help="Tags of the W&B run, such as [pilot,gpu].")
    add("--tensorboard", type=bool, default=False, help="Log to TensorBoard as well.")
    add(
        "--diagnostics",
        type=bool,
        default=False,
        help="Also measure the model itself after every experience; the counts stay the same.",
    )
    add(
        "--keep",
        type=Keep | None,
        default=None,
        help="What to keep after every experience: model, predictions, or all; the result stays the same.",
    )
    add(
        "--keep_logits", type=bool, default=False, help="Let predictions hold the logits of all classes seen."
    )
    add(
        "--resume",
        type=bool,
        default=True,
        help="Resume an interrupted run of this cell; false starts it from the beginning.",
    )
    add(
        "--checkpoint_every",
        type=float,
        default=EVERY,
        help="Write a checkpoint at the end of an epoch if the last is at least this many seconds old.",
    )


def _add_factors(parser: ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=1, help="Seed of all randomness except the class order.")
    parser.add_argument(
        "--order",
        type=str | list[int],
        default="identity",
        help="Class order: identity, numpy:SEED, python:SEED, or a list of classes.",
    )


def _add_group(
    parser: ArgumentParser, group: str, class_: type[Any], skip: set[str | int] | None = None
) -> None:
    parser.add_class_arguments(
        class_,
        group,
        skip=skip,
        instantiate=False,
        fail_untyped=False,
        sub_configs=True,
    )


def _parsed(parse: Callable[[], Namespace], named: Callable[[str], str]) -> Namespace:
    """Return what ``parse`` returns; errors call a key what ``named`` returns for it."""
    try:
        values = parse()
    except ArgumentError as error:
        raise ValueError(_one_sentence(str(error), named)) from error
    threads = values.get("threads", 1)
    if not 1 <= threads <= _MOST_THREADS:
        raise ValueError(f"{named('threads')} cannot be {threads}: expected 1 to {_MOST_THREADS}.")
    for key in ("setting", "data.name"):
        name = values.get(key)
        if name is not None and (name in ("", ".", "..") or "/" in name or "\\" in name):
            raise ValueError(
                f"{named(key)} cannot be {name!r}: it names a folder, so write a word without slashes."
            )
    return values


def _one_sentence(message: str, named: Callable[[str], str]) -> str:
    """Condense a message of jsonargparse, which has many lines, to the key, the value and the reason."""
    _, *parts = re.split(r'Parser key "([^"]+)":', message)
    if not parts:
        return " ".join(message.split())
    key, text = named(".".join(parts[::2])), parts[-1]
    found = re.search(r"(?:value:|Expected a path but) (.+?)(?: either not acc|\.+ Got value|\n|$)", text)
    value = re.sub(r"Namespace\(class_path='(.+?)'.*", r"\1", found[1]) if found else ""
    reason = _reason(text)
    if "import path" in reason or "has no attribute" in reason:
        match = nearest_class(value)
    else:
        match = nearest(value, reason.split("'")[1::2]) if "one of [" in reason else None
    refused = f"{key} cannot be {value!r}: {reason}." if value else f"{key}: {reason}."
    return f"{refused} Did you mean {match}?" if match else refused


def _reason(text: str) -> str:
    r"""Return why jsonargparse refuses a value, without the lines that are the same for every value.

    >>> _reason("Errors:\n  - Expected a <class 'int'>\n  - Expected a <class 'NoneType'>\nGiven value: x")
    'expected int or null'
    """
    lines = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).splitlines()
    lines = [line.strip(" -").partition(". Got value:")[0] for line in lines]
    lines = [line.rpartition("callable class: ")[2] for line in lines if line and not line.startswith(_FRAME)]
    types = [line.removeprefix("Expected a ") for line in lines if line.startswith("Expected a ")]
    if len(types) < len(lines):  # a reason that is more than a type
        return " ".join(dict.fromkeys(line for line in lines if not line.startswith("Expected a "))).rstrip(
            "."
        )
    if not {*types} - {"NoneType"}:
        types.insert(0, "the import path of a class")
    expected = " or ".join(dict.fromkeys(types))
    return f"expected {expected}".replace("typing.Literal", "one of ").replace("NoneType", "null")
