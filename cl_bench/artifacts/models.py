"""The model after an experience, in a file of tensors and JSON that is safe to read even if untrusted.

A file holds what the strategy has beyond its pre-trained backbone, bit by bit. Tensors are stored as
safetensors; everything else is JSON in the header of the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from cl_bench.artifacts import MODELS
from cl_bench.loop.snapshot import Snapshot
from cl_bench.results.files import replaced

SCHEMA = 1

_HEADER = "cl_bench"
_WHOLE, _ROWS, _VALUES = "whole/", "rows/", "values/"  # before the name of a tensor, or of its changed rows


@dataclass(frozen=True)
class Origin:
    """What a kept model belongs to.

    Attributes:
        cell: Hash of the cell.
        strategy: Class path of the method.
        weights_sha256: Of the pre-trained backbone, which the file does not hold.
        experience: Index of the experience after which the model was kept.
    """

    cell: str
    strategy: str
    weights_sha256: str
    experience: int


def file_of(folder: Path, after: int) -> Path:
    """Return the file of the model after experience ``after``, counted from 0, in a cell's folder."""
    return folder / MODELS / f"experience{after + 1}.safetensors"


def write(path: Path, origin: Origin, model: Snapshot, require: Callable[[], None] = lambda: None) -> None:
    """Write a snapshot of a strategy, atomically.

    Args:
        path: The file, as :func:`file_of` names it.
        origin: What it belongs to.
        model: The snapshot.
        require: Called before the file replaces an earlier one; what it raises keeps that.

    Raises:
        ValueError: If an extra state of the strategy is not JSON.
        OSError: If it cannot be written; the old file is kept.
    """
    for name, value in model["extra"].items():
        if not _is_json(value):
            raise ValueError(
                f"The state {name} of this strategy cannot be kept, since it is not JSON: let "
                "get_extra_state return numbers, words, lists, and dicts whose keys are words."
            )
    tensors: dict[str, Tensor] = {}
    for name, value in model["tensors"].items():
        if isinstance(value, Tensor):
            tensors[_WHOLE + name] = value
        else:
            tensors[_ROWS + name], tensors[_VALUES + name] = value
    header = {"schema": SCHEMA, "origin": asdict(origin)}
    header |= {name: model[name] for name in ("names", "extra", "trained")}
    content = safetensors.torch.save(tensors, {_HEADER: json.dumps(header)})
    with replaced(path, require) as file:
        file.write(content)


def read(path: Path) -> tuple[Origin, Snapshot]:
    """Return what a kept model belongs to, and the snapshot.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a kept model, or one of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no kept model {path}.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {})[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # not a mapping
        if header["schema"] != SCHEMA:
            raise ValueError(f"it has schema {header['schema']!r}, and this version reads {SCHEMA}")
        origin = Origin(**header["origin"])
        snapshot = {name: header[name] for name in ("names", "extra", "trained")}
        return origin, snapshot | {"tensors": dict(_differences(tensors))}
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} is not a model that this version has kept ({reason}): run its cell again with "
            "--keep model."
        ) from error


def _differences(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor | tuple[Tensor, Tensor]]]:
    """Return each tensor, or the indices and the values of its changed rows, with its name."""
    found: list[tuple[str, Tensor | tuple[Tensor, Tensor]]] = []
    for name, tensor in tensors.items():
        if name.startswith(_WHOLE):
            found.append((name.removeprefix(_WHOLE), tensor))
        elif name.startswith(_ROWS):
            own = name.removeprefix(_ROWS)
            found.append((own, (tensor, tensors[_VALUES + own])))
    return found


def _is_json(value: Any) -> bool:
    """Return whether JSON gives ``value`` back as it is."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False
