"""Config files: where they are, how they are read, and how one is written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from cl_bench.errors import suggestion

Config = dict[str, Any]

GROUPS = ("model", "data", "backbone", "trainer")
"""The groups of keys, each of which has the arguments of one class."""

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
"""Folder of the shipped configs."""

_load_yaml = get_loader("yaml")  # PyYAML's own loader reads 5e-4 as text

_MOST_VALUES = 100_000  # in a config, once every alias is replaced by what it stands for


def stems_of(kind: str) -> list[str]:
    """Return the names of the configs under ``configs/<kind>``."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))


def config_file(kind: str, name: str) -> Path:
    """Return the file of config ``name``, a stem under ``configs/<kind>`` or the path of a YAML file.

    Raises:
        ValueError: If no config has that stem.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(os.path.expanduser(name))
    stems = stems_of(kind)
    if name not in stems:
        raise ValueError(f"There is no config {name!r} among {kind}. {suggestion(name, stems)}")
    return CONFIGS / kind / f"{name}.yaml"


def load(path: Path) -> Config:
    """Return the content of a config file, with the path of the home folder for a leading ``~``.

    Raises:
        ValueError: If it is not a mapping in YAML, from text to plain values, with each key once.
        FileNotFoundError: If the file does not exist.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no config file {path}.")
    try:
        text = path.read_text(encoding="utf-8")
        require_tree(text, str(path))
        config = _load_yaml(text)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.object[error.start]:#04x} at position {error.start}): "
            "save it as UTF-8."
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{path} is not a config: its top level must be a mapping of groups such as model and data."
        )
    _require_plain(config, path)
    expanded: Config = _with_home(config)
    return expanded


def require_tree(text: str, name: str) -> None:
    """Check that a YAML text has no key twice in a mapping, and that its aliases end and stay small.

    Args:
        text: The text.
        name: What an error calls it.

    Raises:
        ValueError: If not.
        yaml.YAMLError: If the text is not valid YAML.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        number = 0 if root is None else _values(root, name, {}, set())
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply: write fewer levels.") from error
    if number > _MOST_VALUES:
        raise ValueError(
            f"The aliases in {name} stand for {number:,} values, and a config has at most {_MOST_VALUES:,}: "
            "write the values themselves."
        )


def _values(node: yaml.Node, name: str, known: dict[int, int], above: set[int]) -> int:
    """Return the number of values in ``node``, those behind an alias counted wherever it stands."""
    if id(node) in above:
        raise ValueError(
            f"An alias in {name}, line {node.start_mark.line + 1}, contains itself: write the value itself."
        )
    if id(node) in known:
        return known[id(node)]
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif isinstance(node, yaml.MappingNode):
        _require_each_once([key for key, _ in node.value if isinstance(key, yaml.ScalarNode)], name)
        inner = [part for pair in node.value for part in pair]
    above.add(id(node))
    known[id(node)] = 1 + sum(_values(child, name, known, above) for child in inner)
    above.discard(id(node))
    return known[id(node)]


def _require_each_once(keys: Sequence[yaml.ScalarNode], name: str) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key in keys:
        line = key.start_mark.line + 1
        if (before := lines.get((key.tag, key.value))) is not None:
            raise ValueError(
                f"The key {key.value} is in {name} twice, in lines {before} and {line}: remove one of them."
            )
        lines[key.tag, key.value] = line


def _with_home(value: Any) -> Any:
    """Return ``value`` with the path of the home folder in keys and texts that begin with ``~``."""
    if isinstance(value, dict):
        return {os.path.expanduser(key): _with_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


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


def words(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the words of the command line that set ``values``.

    >>> words({"rank": 4, "order": "numpy:1993"})
    ('--rank=4', '--order=numpy:1993')
    """
    return tuple(
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()
    )


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes text that the loader would read as something else, such as 1e3."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    try:
        is_text = isinstance(_load_yaml(text), str)
    except yaml.YAMLError:
        is_text = True  # PyYAML itself quotes text that is not valid YAML
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_text else "'")


_Dumper.add_representer(str, _text)
