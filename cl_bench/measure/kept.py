"""Outputs of a map that does not change, kept batch by batch so that no image meets it twice."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_bench.results.files import is_whole, replaced


class KeptBatch(NamedTuple):
    """What is known of one batch: its labels (B,), and the outputs (B, …) of the map for its images."""

    labels: Tensor
    outputs: Tensor


class KeptBatches:
    """Outputs for one batch after another, in files that outlive the process.

    The files are mapped into memory: the system loads what is used, and drops it again if memory is short.

    Args:
        folder: Where the files are; a temporary folder if None.

    Attributes:
        batches: What is kept under the key at hand, in main memory.

    >>> kept = KeptBatches()
    >>> kept.open({"weights": 1})
    >>> kept.add([KeptBatch(torch.zeros(2), torch.ones(2, 8))])
    >>> kept.open({"weights": 1}), len(kept.batches)
    (None, 1)
    >>> kept.open({"weights": 2}), len(kept.batches)
    (None, 0)
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = Path(mkdtemp(prefix="cl-bench-")) if folder is None else folder
        if folder is None:
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._key: dict[str, Any] | None = None
        self.batches: list[KeptBatch] = []

    def open(self, key: Mapping[str, Any]) -> None:
        """Hold what is kept under ``key``, plain values that name all that the outputs depend on."""
        if self._key == key:
            return
        self._key, self.batches = dict(key), []
        while (file := self._next).exists() and is_whole(file):
            found = torch.load(file, mmap=True, weights_only=True)
            if found["key"] != self._key:
                return
            self._hold(found)

    def add(self, batches: list[KeptBatch]) -> None:
        """Keep ``batches`` after those that are there.

        Raises:
            OSError: If they cannot be written.
        """
        if not batches:
            return
        file = self._next
        with replaced(file) as stream:
            torch.save({"key": self._key, "batches": [tuple(batch) for batch in batches]}, stream)
        self._hold(torch.load(file, mmap=True, weights_only=True))

    @property
    def _next(self) -> Path:
        """The file of the batches that follow, named after their number."""
        return self._folder / f"{len(self.batches):06d}.pt"

    def _hold(self, found: Mapping[str, Any]) -> None:
        self.batches += [KeptBatch(*batch) for batch in found["batches"]]
