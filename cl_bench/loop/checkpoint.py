"""Checkpoints of a run: their content, their owner, and the files.

A checkpoint is one file of tensors and plain values. It is written whole or not at all, the last two of a
cell are kept, and reading it runs no code.
"""

from __future__ import annotations

import pickle
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from cl_bench.loop.course import Phase
from cl_bench.loop.provenance import differing_images
from cl_bench.results.files import is_whole, replaced

SCHEMA = 1
FOLDER_NAME = "checkpoints"
EVERY = 60.0
"""Seconds after which the end of an epoch writes another checkpoint."""

_KEPT = 2


@dataclass(frozen=True)
class Owner:
    """The run that a checkpoint belongs to; the checkpoint of another owner is refused.

    Attributes:
        cell: Hash of the cell.
        strategy: Class path of the method.
        weights_sha256: Of the pre-trained backbone, which a checkpoint does not hold.
        images: Hashes of the images, by their names in a result.
    """

    cell: str
    strategy: str
    weights_sha256: str
    images: dict[str, str] = field(default_factory=dict)


@dataclass
class Checkpoint:
    """A run at one moment, between two steps.

    Attributes:
        owner: The run that it belongs to.
        phase: What comes next.
        experience: Index of the experience in the stream, from 0.
        epoch: Epochs of the experience that are done.
        batches: Batches of the next epoch that are done.
        circumstances: What bit-exactness depends on besides the cell: device, versions, number of processes.
        strategy: What the method holds beyond its pre-trained backbone.
        random: States of the random generators, for each process.
        shares: What each process except the first has measured so far; ``strategy`` holds the first's.
        loops: Lightning's counters of epochs, batches and steps.
        training: Optimizers and schedules if a step comes next; otherwise only an optimizer of the stream.
        callbacks: State of each callback that has one, by its key.
        result: Evaluations, costs, diagnostics and resumptions so far.
        seconds: Seconds of this experience so far, by phase.
        trainable: Number of parameters with a gradient.
        schema: Version of this layout.
    """

    owner: Owner
    phase: Phase
    experience: int
    circumstances: dict[str, Any]
    strategy: dict[str, Any]
    random: list[dict[str, Any]]
    loops: dict[str, Any]
    shares: list[dict[str, torch.Tensor]] = field(default_factory=list)
    epoch: int = 0
    batches: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    trainable: int = 0
    schema: int = SCHEMA

    @property
    def place(self) -> str:
        """Where in the stream it was written, in words."""
        inside = f", {self.batches} batches into epoch {self.epoch + 1}" if self.batches else ""
        epochs = f" after {self.epoch} epochs" if self.phase == "training" and not inside else ""
        return f"experience {self.experience + 1}, {self.phase}{epochs}{inside}"

    def differences(self, circumstances: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Return the circumstances that differ, each with its value then and now."""
        names = sorted(self.circumstances.keys() | circumstances.keys())
        pairs = {name: [self.circumstances.get(name), circumstances.get(name)] for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


class Refused(ValueError):
    """A run cannot resume from the checkpoint in its folder."""


class Checkpoints:
    """The last two checkpoints of a cell, in a folder of their own.

    Args:
        folder: Where they are.
        cell: Hash of the cell.
        every: Seconds after which the end of an epoch writes another.

    Attributes:
        require: Called before a file is written or removed; what it raises keeps the files.
    """

    def __init__(self, folder: Path, cell: str, every: float = EVERY) -> None:
        if every < 0:
            raise ValueError(f"Checkpoints cannot be written every {every} seconds: give 0 or more.")
        self.folder = folder
        self.cell = cell
        self.every = every
        self.require: Callable[[], None] = lambda: None
        self._written = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the end of an epoch should write one."""
        return time.monotonic() - self._written >= self.every

    @property
    def last(self) -> Path | None:
        """The newest file, None without one."""
        return self._files()[-1] if self._files() else None

    def write(self, checkpoint: Checkpoint) -> Path:
        """Write ``checkpoint``, and remove all but the last two.

        Raises:
            OSError: If it cannot be written; earlier ones are kept.
        """
        before = self._files()
        number = _number(before[-1]) + 1 if before else 1
        path = self.folder / f"{number:06d}-experience{checkpoint.experience + 1}-{checkpoint.phase}.ckpt"
        content = {part.name: getattr(checkpoint, part.name) for part in fields(checkpoint)}
        self.require()
        for unfinished in self.folder.glob(".*.ckpt.*"):  # of a process that was killed
            unfinished.unlink()
        with replaced(path, self.require) as file:
            torch.save(content | {"owner": vars(checkpoint.owner)}, file)
        for old in before[: 1 - _KEPT]:
            old.unlink()
        self._written = time.monotonic()
        return path

    def latest(self, owner: Owner) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest undamaged checkpoint, None without one, and the names of newer, damaged files.

        Args:
            owner: The run that resumes.

        Raises:
            Refused: If a file would run code when read, or belongs to another owner or version.
        """
        damaged = []
        for path in reversed(self._files()):
            if not is_whole(path):
                damaged.append(path.name)
                continue
            checkpoint = _read(path)
            _require_owner(path, checkpoint.owner, owner)
            return checkpoint, damaged
        return None, damaged

    def clear(self) -> None:
        """Remove the folder, with any leftovers of a killed process."""
        self.require()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        """Return the files, oldest first."""
        return sorted((path for path in self.folder.glob("*.ckpt") if _named(path)), key=_number)


def _named(path: Path) -> bool:
    return re.match(r"\d+-", path.name) is not None


def _number(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _read(path: Path) -> Checkpoint:
    remedy = "remove its folder to restart the cell."
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise Refused(
            f"The checkpoint {path} holds more than tensors and plain values, and reading it could run code: "
            f"{remedy}"
        ) from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        schema = content.get("schema") if isinstance(content, dict) else None
        raise Refused(f"The checkpoint {path} has schema {schema}, and this version reads {SCHEMA}: {remedy}")
    try:
        return Checkpoint(**content | {"owner": Owner(**content["owner"])})
    except (KeyError, TypeError) as error:
        raise Refused(f"The checkpoint {path} has other fields than this version writes: {remedy}") from error


def _require_owner(path: Path, found: Owner, expected: Owner) -> None:
    names = {"cell": "cell", "strategy": "strategy", "weights_sha256": "backbone"}
    for attribute, name in names.items():
        its, mine = getattr(found, attribute), getattr(expected, attribute)
        if its != mine:
            raise Refused(
                f"The checkpoint {path} belongs to {name} {its}, and this run to {name} {mine}: remove its "
                "folder to restart the cell."
            )
    if (images := differing_images(found.images, expected.images)) is not None:
        raise Refused(
            f"The checkpoint {path} was written with {images} than the dataset has now: restore them, or "
            "restart the cell with --resume=false."
        )
