"""CIFAR-100: three pickled batches, read without running code that a pickle may hold.

Source: https://www.cs.toronto.edu/~kriz/cifar.html, the python version.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FOLDER = "cifar-100-python"
"""Folder in the archive."""

MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
"""Md5 of each file in ``FOLDER``."""

_SIDE = 32

# All that the three files name besides plain values: how NumPy 1 and 2 pickle an array.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


def images(root: Path, split: Literal["train", "test"]) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """Return the images (N, 32, 32, 3) of a split and their fine labels (N,), in the order of the file.

    Raises:
        FileNotFoundError: If the file is not there.
        ValueError: If the file is not the published one.
    """
    batch = _read(root, split)
    pixels = np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, _SIDE, _SIDE)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), list(batch["fine_labels"])


def names(root: Path) -> list[str]:
    """Return the name of each fine label.

    Raises:
        FileNotFoundError: If the file is not there.
        ValueError: If the file is not the published one.
    """
    return list(_read(root, "meta")["fine_label_names"])


def _read(root: Path, name: str) -> dict[str, Any]:
    path = root / FOLDER / name
    if not path.is_file():
        raise FileNotFoundError(
            f"The file {path} does not exist: fetch it with cl-bench prepare cifar100 --root {root}"
        )
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != MD5[name]:
        raise ValueError(
            f"{path} is not the published file, its md5 differs: remove {path.parent} and prepare again."
        )
    return restricted(content, str(path))


def restricted(content: bytes, name: str) -> dict[str, Any]:
    """Return the mapping in a pickle of plain values and arrays.

    Args:
        content: The pickle, written by Python 2.
        name: Its name in errors.

    Raises:
        ValueError: If it is not such a pickle, or names anything else.
    """
    try:
        loaded = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(f"{name} is refused ({error}): remove it and prepare again.") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{name} does not hold a mapping: remove it and prepare again.")
    return loaded


class _Unpickler(pickle.Unpickler):
    """Finds only what an array needs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no array needs")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
