"""Config files: where they are, how they are read, and how one is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from cl_bench.errors import suggestion

Config = dict[str, Any]

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
"""Folder of the shipped configs."""

_load_yaml = get_loader("yaml")  # PyYAML's own loader reads 5e-4 as text


def stems_of(kind: str) -> list[str]:
    """Return the names of the configs under ``configs/<kind>``."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))


def config_file(kind: str, name: str) -> Path:
    """Return the file of config ``name``, a stem under ``configs/<kind>`` or the path of a YAML file.

    Raises:
        ValueError: If no config has that stem.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    stems = stems_of(kind)
    if name not in stems:
        raise ValueError(f"There is no config {name!r} among {kind}. {suggestion(name, stems)}")
    return CONFIGS / kind / f"{name}.yaml"


def load(path: Path) -> Config:
    """Return the content of a config file.

    Raises:
        ValueError: If it is not a mapping in YAML, from text to plain values.
        FileNotFoundError: If the file does not exist.
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


def _require_plain(value: Any, path: Path) -> None:
    """Refuse keys that are not text, and values that a command line cannot express, such as bytes."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"The key {key!r} in {path} is not text: put it in quotes.")
    elif not (value is None or isinstance(value, str | int | float | list)):
        raise ValueError(f"The value {value!r} in {path} is neither text nor number: put it in quotes.")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _require_plain(item, path)


def dumped(config: Config) -> str:
    """Return a config as YAML, from which :func:`load` reads the same values."""
    text: str = yaml.dump(config, Dumper=_Dumper, sort_keys=False)
    return text


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes text that the loader would read as something else, such as 1e3."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    try:
        is_text = isinstance(_load_yaml(text), str)
    except yaml.YAMLError:
        is_text = True  # PyYAML itself quotes text that is not valid YAML
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_text else "'")


_Dumper.add_representer(str, _text)
