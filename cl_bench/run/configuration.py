"""From config layers and the command line to one resolved configuration, its cell and its folder.

Layers describe a run, and later ones override earlier ones: ``configs/trainer.yaml``, the strategy's config,
the dataset's config, the recipe for that pair if one exists, and the command line.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.contracts.strategy import Strategy
from cl_bench.loop.checkpoint import FOLDER_NAME, Checkpoints
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.network.backbones import Backbone, weights_identity
from cl_bench.processes.launcher import is_single
from cl_bench.results.files import file_name
from cl_bench.results.result import digest
from cl_bench.results.tuning import Tuning, read
from cl_bench.run.configs import CONFIGS, GROUPS, Config, config_file, dumped, load, words
from cl_bench.run.schema import WANDB, Schema, factors, keys_of, nearest_class

# The hash of a cell contains class paths. If a class moves to another file, cells keep its first path, and
# configs may contain either.
_FIRST_PATHS = {"cl_bench.maths.schedules.QuarterCosine": "cl_bench.schedules.QuarterCosine"}
_PATHS = {first: path for path, first in _FIRST_PATHS.items()}

_LONGEST_PART = 200  # bytes; file systems take 255
_KEPT = {"diagnostics", "keep", "keep_logits", "resume", "tensorboard", "wandb", "wandb_tags"}
_NAMES_AND_PATHS = {"code", "results", "setting", "tuned", *(f"wandb_{name}" for name in WANDB)}
_RUN_KEYS_OUTSIDE_THE_CELL = {"checkpoint_every", *_KEPT, *_NAMES_AND_PATHS}
_DATA_KEYS_OUTSIDE_THE_CELL = {"cache_dir", "name", "num_workers", "root"}  # it holds name as its dataset
_LATER_KEYS = {"first_experiences"}  # not in the hashes of cells that do not set them
_TRAINER_KEYS_OUTSIDE_THE_CELL = {
    "accelerator",
    "barebones",
    "check_agreement",
    "default_root_dir",
    "detect_anomaly",
    "devices",
    "enable_autolog_hparams",
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
    "log_every_n_steps",
    "model_registry",
    "num_nodes",
    "profiler",
    "strategy",
}

# Lightning's full names; its own table, in lightning.fabric.plugins.precision.precision, is private.
_PRECISIONS = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


@dataclass(frozen=True, eq=False)
class Configuration:
    """A resolved run.

    Attributes:
        strategy_class: The method.
        datamodule_class: The dataset.
        schema: The arguments of both.
        namespace: Their values.
        code: Folders from which the layers may import classes.
        layers: What it was resolved from, before words of the command line.
    """

    strategy_class: type[Strategy]
    datamodule_class: type[StreamDataModule]
    schema: Schema
    namespace: Namespace
    code: Sequence[Path] = ()
    layers: Sequence[Path | Config] = ()

    @cached_property
    def resolved(self) -> Config:
        """Every setting as a plain value, without the defaults of PyTorch's and Lightning's own classes."""
        config: Config = json.loads(
            self.schema.parser.dump(
                self.namespace,
                skip_link_targets=True,
                skip_unset=False,
                skip_validation=True,  # parsing validated it
                format="json",
            )
        )
        trainer = config["trainer"] | {"precision": _precision(config["trainer"]["precision"])}
        config["trainer"] = _without_defaults(trainer, StreamTrainer, Trainer)
        ours = self.schema.defaults
        for group, class_ in (("model", self.strategy_class), ("data", self.datamodule_class)):
            arguments = {
                key: _without_torch_defaults(value, ours.get(f"{group}.{key}"))
                for key, value in config[group].items()
            }
            config[group] = {"class_path": _class_path(class_), "init_args": arguments}
        used = {_root(class_path) for class_path in _class_paths(config)}
        code = [str(folder) for folder in self.code if folder in used]
        return ({"code": code} if code else {}) | config

    @cached_property
    def cell(self) -> Config:
        """The resolved config without paths, devices and logging: equal cells are the same experiment."""
        config: Config = _renamed(_without(self.resolved, _RUN_KEYS_OUTSIDE_THE_CELL), _FIRST_PATHS)
        backbone = config["backbone"]
        model, data = (
            {
                key: _without_torch_defaults(value)
                for key, value in config[group]["init_args"].items()
                if value is not None or key not in _LATER_KEYS
            }
            for group in ("model", "data")
        )
        study = self.tuning
        tuning = {} if study is None else {"tuning": study.summary | {"space": digest(study.space)}}
        return (
            config
            | tuning
            | {
                "model": config["model"] | {"init_args": model},
                "dataset": self.datamodule.name,
                "trainer": _without(config["trainer"], _TRAINER_KEYS_OUTSIDE_THE_CELL),
                "data": config["data"] | {"init_args": _without(data, _DATA_KEYS_OUTSIDE_THE_CELL)},
                "backbone": backbone | {"weights": weights_identity(backbone["model"], backbone["weights"])},
            }
        )

    def overridden(self, overrides: Sequence[str]) -> Configuration:
        """Return the configuration with command-line ``overrides`` on top, as :func:`resolve` does.

        Raises:
            ValueError: If a key or a value is not valid.
        """
        given = [_PATHS.get(word, word) for word in overrides]
        values = self.schema.overridden(self.namespace.clone(), given)
        if values.tuned and values.tuned != self.namespace.tuned:
            place = next(i for i, word in enumerate(given) if word.partition("=")[0] == "--tuned")
            given[place:place] = words(read(Path(values.tuned)).chosen)  # options after it replace them
            values = self.schema.overridden(self.namespace.clone(), given)
        return replace(self, namespace=values)

    @cached_property
    def tuning(self) -> Tuning | None:
        """The study whose best settings the run starts from, if any."""
        return read(Path(self.namespace.tuned)) if self.namespace.tuned else None

    def varied(self, seed: str, order: str) -> Configuration:
        """Return the configuration with another seed and class order, which no other setting depends on.

        It is what :func:`resolve` returns for the same words, in a hundredth of the time.

        Args:
            seed: As a word of the command line.
            order: As a word of the command line.

        Raises:
            ValueError: If one of them is not valid.
        """
        values = factors(seed, order)
        namespace = self.namespace.clone()
        for name, value in values.items():
            namespace[name] = namespace[f"data.{name}"] = value
        varied = replace(self, namespace=namespace)
        arguments = self._data_arguments | values
        known = {
            "resolved": self.resolved | values,
            "cell": self.cell | values,
            "datamodule": self.datamodule_class(**arguments),
            "tuning": self.tuning,
            "_data_arguments": arguments,
        }
        vars(varied).update(known)  # as if they had been computed there
        return varied

    @cached_property
    def hash(self) -> str:
        """Hash of the cell, 8 hex digits."""
        return digest(self.cell)

    @property
    def is_single(self) -> bool:
        """Whether the run has one process."""
        trainer = self.namespace.trainer
        return is_single(trainer.devices, trainer.num_nodes, trainer.strategy)

    @property
    def yaml(self) -> str:
        """The resolved config as YAML: run from a file, it is the same cell."""
        return dumped(self.resolved)

    @property
    def results(self) -> Path:
        """Folder of all results."""
        return Path(self.namespace.results)

    @property
    def benchmark(self) -> str:
        """Dataset and number of experiences, such as ``digits-T5``."""
        return _of_path(f"{self.datamodule.name}-T{self.datamodule.stream_length}")

    @property
    def folder(self) -> Path:
        """Folder of this cell."""
        strategy = self.strategy_class.__module__.rpartition(".")[2]
        regime = "joint" if self.namespace.regime == "joint" else None
        name = "-".join(part for part in (strategy, regime, self.namespace.setting) if part)
        cell = f"{self.datamodule.order_name}-seed{self.namespace.seed}-{self.hash}"
        return self.results / self.benchmark / _of_path(name) / cell

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints of this cell."""
        return Checkpoints(self.folder / FOLDER_NAME, self.hash, self.namespace.checkpoint_every)

    @cached_property
    def datamodule(self) -> StreamDataModule:
        """The stream, before its data are read."""
        return self.datamodule_class(**self._data_arguments)

    @cached_property
    def _data_arguments(self) -> Config:
        return self._arguments("data")

    def build(
        self, callbacks: Sequence[Callback], loggers: Sequence[Logger]
    ) -> tuple[Strategy, StreamTrainer]:
        """Return the strategy with its backbone, and the trainer."""
        backbone = Backbone(**self._arguments("backbone"))
        strategy = self.strategy_class(backbone=backbone, **self._arguments("model"))
        arguments = self._arguments("trainer")
        own = arguments.pop("callbacks") or []
        own = own if isinstance(own, list) else [own]
        return strategy, StreamTrainer(
            **arguments | {"callbacks": [*callbacks, *own], "logger": list(loggers)}
        )

    def _arguments(self, group: str) -> Config:
        """Return the arguments of a group, with instances of those that are classes."""
        given = Namespace({group: self.namespace[group]})
        arguments: Config = vars(self.schema.parser.instantiate(given)[group])
        return arguments


def resolve(layers: Sequence[Path | Config], overrides: Sequence[str] = ()) -> Configuration:
    """Return the configuration that ``layers`` and command-line ``overrides`` describe.

    A layer is a file, or the content of one. The folder of a layer that is not shipped, and the folders that
    its key ``code`` names, are added to ``sys.path``: a strategy may be in the same folder as its config.

    Raises:
        ValueError: If a layer, a class path, a key or a value is not valid.
        FileNotFoundError: If a layer does not exist.
    """
    config: Config = {}
    files: dict[str, Path] = {}
    code: list[Path] = []
    for path in layers:
        if not isinstance(path, Path):
            _merge(config, _renamed(path, _PATHS))
            continue
        layer = _renamed(load(path), _PATHS)
        code += _code(layer, path)
        _require_groups(layer, path)
        files |= dict.fromkeys(keys_of(_arguments(layer)), path)
        files |= {f"{group}.class_path": path for group in GROUPS if "class_path" in layer.get(group, {})}
        _merge(config, layer)
    sys.path += [str(folder) for folder in dict.fromkeys(code) if str(folder) not in sys.path]
    strategy = _class(config, "model", Strategy, files)
    datamodule = _class(config, "data", StreamDataModule, files)
    schema = _schema(strategy, datamodule)  # type: ignore[arg-type]  # mypy: a type[Any] has no hash
    values = schema.parsed(_arguments(config), files)
    found = Configuration(strategy, datamodule, schema, values, tuple(dict.fromkeys(code)), tuple(layers))
    return found.overridden(overrides)


_schema = cache(Schema)  # cells of a grid share few pairs of classes


def layers(strategy: str, dataset: str) -> list[Path]:
    """Return the config files of a pair; each name is a config stem or the path of a YAML file.

    Raises:
        ValueError: If no config has that stem.
    """
    first, second = config_file("strategies", strategy), config_file("datamodules", dataset)
    recipe = CONFIGS / "recipes" / second.stem / f"{first.stem}.yaml"
    return [CONFIGS / "trainer.yaml", first, second, *([recipe] if recipe.exists() else [])]


def _merge(config: Config, layer: Config) -> None:
    """Override ``config`` with ``layer``; a new class path drops the arguments of the class before it."""
    for key, value in layer.items():
        below = config.get(key)
        if not (isinstance(value, dict) and isinstance(below, dict)):
            config[key] = value
            continue
        if value.get("class_path", below.get("class_path")) != below.get("class_path"):
            below.clear()
        _merge(below, value)


def _code(layer: Config, path: Path) -> list[Path]:
    """Remove the key ``code`` from a layer; return its folders and, unless the layer is shipped, its own."""
    folder = path.resolve().parent
    named = layer.pop("code", None) or []
    if not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise ValueError(f"code in {path} cannot be {named!r}: write a list of folders, such as [src].")
    own = [] if CONFIGS in path.resolve().parents else [folder]
    return [(folder / name).resolve() for name in named] + own


def _require_groups(layer: Config, path: Path) -> None:
    """Check the shape of a layer; an empty group means no settings."""
    if isinstance(layer.get("backbone"), str):
        layer["backbone"] = Backbone.named(layer["backbone"])
    for group in GROUPS:
        if group not in layer:
            continue
        values = layer[group] = _mapping(layer[group], group, path)
        if group not in ("model", "data"):
            continue
        for key in values:
            if key not in ("class_path", "init_args"):
                raise ValueError(
                    f"{group}.{key} in {path} has no effect: write it as {group}.init_args.{key}."
                )
        if "init_args" in values:
            values["init_args"] = _mapping(values["init_args"], f"{group}.init_args", path)


def _mapping(value: Any, key: str, path: Path) -> Config:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} in {path} cannot be {value!r}: write it as a mapping, KEY: VALUE.")
    return value or {}


def _arguments(config: Config) -> Config:
    """Return ``config`` with only the arguments of strategy and datamodule, without their class paths."""
    arguments = {group: config[group].get("init_args", {}) for group in ("model", "data") if group in config}
    return config | arguments


def _class(config: Config, group: str, base: type[Any], files: Mapping[str, Path]) -> type[Any]:
    """Return the class that ``group`` names."""
    class_path = config.get(group, {}).get("class_path")
    if class_path is None:
        raise ValueError(f"No layer names the class of {group}: write {group}: {{class_path: module.Class}}.")
    key = f"{group}.class_path"
    where = f"{key} in {files[key]}" if key in files else key
    if not (isinstance(class_path, str) and all(class_path.rpartition(".")[::2])):
        raise ValueError(f"{where} cannot be {class_path!r}: write module.Class.")
    module_name, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        match = nearest_class(class_path)
        raise ValueError(
            f"{where} cannot be {class_path!r}: {error}." + (f" Did you mean {match}?" if match else "")
        ) from error
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise ValueError(f"{where} cannot be {class_path!r}: it is not a subclass of {base.__name__}.")
    return found


def _class_paths(value: Any) -> Iterator[str]:
    """Yield every class path in a config."""
    if isinstance(value, dict) and isinstance(value.get("class_path"), str):
        yield value["class_path"]
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _class_paths(item)


def _renamed(value: Any, paths: Mapping[str, str]) -> Any:
    """Return a copy of a config with its class paths replaced by what ``paths`` maps them to."""
    if isinstance(value, dict):
        return {key: _renamed(item, paths) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, paths) for item in value]
    return paths.get(value, value) if isinstance(value, str) else value


def _root(class_path: str) -> Path | None:
    """Return the folder from which the module of a class was imported."""
    module = sys.modules[class_path.partition(".")[0]]
    place = next(iter(getattr(module, "__path__", ())), getattr(module, "__file__", None))
    return Path(place).resolve().parent if place else None


def _class_path(class_: type[Any]) -> str:
    return f"{class_.__module__}.{class_.__qualname__}"


def _without(config: Config, keys: Collection[str]) -> Config:
    return {key: value for key, value in config.items() if key not in keys}


def _precision(value: str | int | None) -> str | None:
    """Return Lightning's full name of a precision, None for its default."""
    name = _PRECISIONS.get(str(value), value)
    return None if name in (None, "32-true") else str(name)


def _without_defaults(arguments: Config, *classes: type[Any]) -> Config:
    """Drop arguments that equal the default in the signature of the first of ``classes`` that names them."""
    defaults: Config = {}
    for class_ in reversed(classes):
        for name, parameter in inspect.signature(class_).parameters.items():
            default = parameter.default
            defaults[name] = list(default) if isinstance(default, tuple) else default
    return {key: value for key, value in arguments.items() if key not in defaults or value != defaults[key]}


def _without_torch_defaults(value: Any, ours: Any = None) -> Any:
    """Drop the defaults of a PyTorch class, which follow PyTorch's version, and keep what differs from ours.

    ``ours`` is the default of this argument. A setting of it, under this class or another, takes the place of
    one that is left out.
    """
    if not (isinstance(value, dict) and str(value.get("class_path")).startswith("torch.")):
        return value
    module, _, name = value["class_path"].rpartition(".")
    given = value.get("init_args", {})
    arguments = _without_defaults(given, getattr(importlib.import_module(module), name))
    if isinstance(ours, Namespace):
        before = json.loads(json.dumps(ours.init_args.as_dict()))
        arguments = {k: item for k, item in given.items() if k in arguments or item != before.get(k, item)}
    return {"class_path": value["class_path"], "init_args": arguments}


def _of_path(name: str) -> str:
    """Return ``name`` as one part of a path; a dataset or setting may be called anything.

    >>> _of_path("my birds-T5"), _of_path("../x-T5")
    ('my birds-T5', '_x-T5-fe8bb0ea')
    """
    plain = name == Path(name).name and name.isprintable() and len(name.encode()) <= _LONGEST_PART
    return name if plain else file_name(name)
