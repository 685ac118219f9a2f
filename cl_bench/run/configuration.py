"""From config layers and the command line to one resolved configuration, its cell and its folder.

A run is described by layers, later ones winning: ``configs/trainer.yaml``, the strategy's config, the
dataset's config, the recipe for that pair where there is one, and the command line.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, get_loader
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.contracts.strategy import Strategy
from cl_bench.errors import suggestion
from cl_bench.loop.checkpoint import FOLDER_NAME, Checkpoints
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.network.backbones import Backbone, weights_identity
from cl_bench.results.result import digest
from cl_bench.run.schema import GROUPS, Config, Schema, keys_of, nearest_class

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

_load_yaml = get_loader("yaml")  # PyYAML's own loader takes 5e-4 for a word

_RUN_KEYS_OUTSIDE_THE_CELL = {
    "checkpoint_every",
    "code",
    "diagnostics",
    "results",
    "resume",
    "setting",
    "wandb",
}
# A class whose file moved keeps the name that cells know it by, and configs may write either.
_NAMES_IN_CELLS = {"cl_bench.maths.schedules.QuarterCosine": "cl_bench.schedules.QuarterCosine"}
_NAMES_TODAY = {before: today for today, before in _NAMES_IN_CELLS.items()}
_DATA_KEYS_OUTSIDE_THE_CELL = {"cache_dir", "name", "num_workers", "root"}  # the cell holds the name
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
    "logger",
    "model_registry",
    "num_nodes",
    "profiler",
    "strategy",
}

# Lightning's own names for these; the table in lightning.fabric.plugins.precision.precision is private.
_PRECISIONS = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


@dataclass(frozen=True, eq=False)
class Configuration:
    """One resolved run.

    Attributes:
        strategy_class: The method.
        datamodule_class: The dataset.
        schema: The arguments of both.
        namespace: Their values.
        code: Folders of layers, where classes may live beside their config.
    """

    strategy_class: type[Strategy]
    datamodule_class: type[StreamDataModule]
    schema: Schema
    namespace: Namespace
    code: Sequence[Path] = ()

    @cached_property
    def resolved(self) -> Config:
        """Every setting as a plain value; defaults of PyTorch's and Lightning's own classes are left out."""
        config: Config = json.loads(
            self.schema.parser.dump(self.namespace, skip_link_targets=True, skip_unset=False, format="json")
        )
        trainer = config["trainer"] | {"precision": _precision(config["trainer"]["precision"])}
        config["trainer"] = _without_defaults(trainer, StreamTrainer, Trainer)
        for group, class_ in (("model", self.strategy_class), ("data", self.datamodule_class)):
            arguments = {key: _without_torch_defaults(value) for key, value in config[group].items()}
            config[group] = {"class_path": _class_path(class_), "init_args": arguments}
        used = {_root(class_path) for class_path in _class_paths(config)}
        code = [str(folder) for folder in self.code if folder in used]
        return ({"code": code} if code else {}) | config

    @cached_property
    def cell(self) -> Config:
        """The resolved config without paths, devices and logging: equal cells are one experiment."""
        config: Config = _renamed(_without(self.resolved, _RUN_KEYS_OUTSIDE_THE_CELL), _NAMES_IN_CELLS)
        backbone = config["backbone"]
        arguments = _without(config["data"]["init_args"], _DATA_KEYS_OUTSIDE_THE_CELL)
        return config | {
            "dataset": self.datamodule.name,
            "trainer": _without(config["trainer"], _TRAINER_KEYS_OUTSIDE_THE_CELL),
            "data": config["data"] | {"init_args": arguments},
            "backbone": backbone | {"weights": weights_identity(backbone["model"], backbone["weights"])},
        }

    @cached_property
    def hash(self) -> str:
        """Hash of the cell, 8 hex digits."""
        return digest(self.cell)

    @property
    def yaml(self) -> str:
        """The resolved config as YAML: saved and run alone, it is the same cell."""
        text: str = yaml.dump(self.resolved, Dumper=_Dumper, sort_keys=False)
        return text

    @property
    def results(self) -> Path:
        """Folder of all results."""
        return Path(self.namespace.results)

    @property
    def benchmark(self) -> str:
        """Dataset and number of experiences, such as ``digits-T5``."""
        return f"{self.datamodule.name}-T{self.datamodule.stream_length}"

    @property
    def folder(self) -> Path:
        """Folder of this cell."""
        strategy = self.strategy_class.__module__.rpartition(".")[2]
        regime = "joint" if self.namespace.regime == "joint" else None
        name = "-".join(part for part in (strategy, regime, self.namespace.setting) if part)
        cell = f"{self.datamodule.order_name}-seed{self.namespace.seed}-{self.hash}"
        return self.results / self.benchmark / name / cell

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints of this cell."""
        return Checkpoints(self.folder / FOLDER_NAME, self.hash, self.namespace.checkpoint_every)

    @cached_property
    def datamodule(self) -> StreamDataModule:
        """The stream, its data not yet read."""
        return self.datamodule_class(**self._arguments("data"))

    def build(
        self, callbacks: Sequence[Callback], loggers: Sequence[Logger]
    ) -> tuple[Strategy, StreamTrainer]:
        """Build the strategy with its backbone, and the trainer."""
        backbone = Backbone(**self._arguments("backbone"))
        strategy = self.strategy_class(backbone=backbone, **self._arguments("model"))
        arguments = self._arguments("trainer")
        own = arguments.pop("callbacks") or []
        own = own if isinstance(own, list) else [own]
        return strategy, StreamTrainer(
            **arguments | {"callbacks": [*callbacks, *own], "logger": list(loggers)}
        )

    def _arguments(self, group: str) -> Config:
        """Return the arguments of a group, of which those that are classes have been instantiated."""
        given = Namespace({group: self.namespace[group]})
        arguments: Config = vars(self.schema.parser.instantiate(given)[group])
        return arguments


def resolve(layers: Sequence[Path | Config], overrides: Sequence[str] = ()) -> Configuration:
    """Return the configuration that ``layers`` and command-line ``overrides`` describe.

    The folder of a layer becomes importable, so a strategy may live beside its config; so do the folders
    that its key ``code`` names. A layer that is in no file is given as its content.

    Raises:
        ValueError: If a layer, a class path, a key or a value is not valid.
        FileNotFoundError: If a layer does not exist.
    """
    config: Config = {}
    files: dict[str, Path] = {}
    code: list[Path] = []
    for path in layers:
        if not isinstance(path, Path):
            _merge(config, _renamed(path, _NAMES_TODAY))
            continue
        layer = _renamed(load(path), _NAMES_TODAY)
        code += _code(layer, path)
        _require_groups(layer, path)
        files |= dict.fromkeys(keys_of(_arguments(layer)), path)
        files |= {f"{group}.class_path": path for group in GROUPS if "class_path" in layer.get(group, {})}
        _merge(config, layer)
    for folder in code:
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    strategy = _class(config, "model", Strategy, files)
    datamodule = _class(config, "data", StreamDataModule, files)
    schema = Schema(strategy, datamodule)
    values = schema.parse(_arguments(config), overrides, files)
    return Configuration(strategy, datamodule, schema, values, tuple(dict.fromkeys(code)))


def layers(strategy: str, dataset: str) -> list[Path]:
    """Return the config files of a pair; each name is a config stem or the path of a YAML file.

    Raises:
        ValueError: If there is no such stem.
    """
    first, second = config_file("strategies", strategy), config_file("datamodules", dataset)
    recipe = CONFIGS / "recipes" / second.stem / f"{first.stem}.yaml"
    return [CONFIGS / "trainer.yaml", first, second, *([recipe] if recipe.exists() else [])]


def config_file(kind: str, name: str) -> Path:
    """Return the file of config ``name``, a stem under ``configs/<kind>`` or the path of a YAML file.

    Raises:
        ValueError: If there is no such stem.
        FileNotFoundError: If there is no such file.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    stems = stems_of(kind)
    if name not in stems:
        raise ValueError(f"There is no config {name!r} among {kind}. {suggestion(name, stems)}")
    return CONFIGS / kind / f"{name}.yaml"


def stems_of(kind: str) -> list[str]:
    """Return the names of the configs under ``configs/<kind>``."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))


def load(path: Path) -> Config:
    """Return the content of a config file.

    Raises:
        ValueError: If it is not a mapping in YAML, of names to plain values.
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no config file {path}.")
    try:
        config = _load_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{path} is not a config: its top level must be a mapping of groups such as model and data."
        )
    _require_plain(config, path)
    return config


def _merge(config: Config, layer: Config) -> None:
    """Put ``layer`` over ``config``; another class path drops the arguments of the one before."""
    for key, value in layer.items():
        below = config.get(key)
        if not (isinstance(value, dict) and isinstance(below, dict)):
            config[key] = value
            continue
        if value.get("class_path", below.get("class_path")) != below.get("class_path"):
            below.clear()
        _merge(below, value)


def _code(layer: Config, path: Path) -> list[Path]:
    """Take the key ``code`` out of a layer; return its folders and, unless the layer is shipped, its own."""
    folder = path.resolve().parent
    named = layer.pop("code", None) or []
    if not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise ValueError(f"code in {path} cannot be {named!r}: write a list of folders, such as [src].")
    own = [] if CONFIGS in path.resolve().parents else [folder]
    return [(folder / name).resolve() for name in named] + own


def _require_groups(layer: Config, path: Path) -> None:
    """Check the shape of a layer, and let an empty group stand for no settings."""
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
                    f"{group}.{key} in {path} is read by nobody: write it under {group}.init_args."
                )
        if "init_args" in values:
            values["init_args"] = _mapping(values["init_args"], f"{group}.init_args", path)


def _mapping(value: Any, key: str, path: Path) -> Config:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} in {path} cannot be {value!r}: write it as a mapping, KEY: VALUE.")
    return value or {}


def _require_plain(value: Any, path: Path) -> None:
    """Refuse keys that are not text, and values that no command could hold, such as dates."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"The key {key!r} in {path} is not text: put it in quotes.")
    elif not (value is None or isinstance(value, str | int | float | list)):
        raise ValueError(f"The value {value!r} in {path} is neither text nor number: put it in quotes.")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _require_plain(item, path)


def _arguments(config: Config) -> Config:
    """Return ``config`` with the arguments of strategy and datamodule in place of class and arguments."""
    arguments = {group: config[group].get("init_args", {}) for group in ("model", "data") if group in config}
    return config | arguments


def _class(config: Config, group: str, base: type[Any], files: Mapping[str, Path]) -> type[Any]:
    """Return the class that ``group`` names."""
    class_path = config.get(group, {}).get("class_path")
    if class_path is None:
        raise ValueError(f"No layer says which class to use: write {group}: {{class_path: module.Class}}.")
    key = f"{group}.class_path"
    said = f"{key} in {files[key]}" if key in files else key
    if not (isinstance(class_path, str) and all(class_path.rpartition(".")[::2])):
        raise ValueError(f"{said} cannot be {class_path!r}: write module.Class.")
    module_name, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        match = nearest_class(class_path)
        raise ValueError(
            f"{said} cannot be {class_path!r}: {error}." + (f" Did you mean {match}?" if match else "")
        ) from error
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise ValueError(f"{said} cannot be {class_path!r}: it is no subclass of {base.__name__}.")
    return found


def _class_paths(value: Any) -> Iterator[str]:
    """Yield every class path in a config."""
    if isinstance(value, dict) and isinstance(value.get("class_path"), str):
        yield value["class_path"]
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _class_paths(item)


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """Return a copy of a config in which every class path that ``names`` knows has its other name."""
    if isinstance(value, dict):
        return {
            key: names.get(item, item)
            if key == "class_path" and isinstance(item, str)
            else _renamed(item, names)
            for key, item in value.items()
        }
    return [_renamed(item, names) for item in value] if isinstance(value, list) else value


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
    """Return Lightning's own name of a precision, None for its default."""
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


def _without_torch_defaults(value: Any) -> Any:
    """Drop the defaults of PyTorch's classes: they follow its version, which is provenance, no setting."""
    if not (isinstance(value, dict) and str(value.get("class_path")).startswith("torch.")):
        return value
    module, _, name = value["class_path"].rpartition(".")
    arguments = _without_defaults(value.get("init_args", {}), getattr(importlib.import_module(module), name))
    return {"class_path": value["class_path"], "init_args": arguments}


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes text in quotes where the loader would not take it for text, such as 1e3."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    try:
        is_text = isinstance(_load_yaml(text), str)
    except yaml.YAMLError:
        is_text = True  # PyYAML itself quotes what is no YAML at all
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_text else "'")


_Dumper.add_representer(str, _text)
