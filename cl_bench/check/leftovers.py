"""What a training leaves behind of its images, in memory and in files."""

from __future__ import annotations

import ctypes
import gc
import io
import mmap
import os
import sys
import sysconfig
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cl_bench.check.subject import Run, Subject
from cl_bench.contracts.low_rank import memory_of
from cl_bench.contracts.strategy import Strategy, state_bytes

_FEW_IMAGES = 3  # of each class: a memory for more than that many is seen to grow
_IMAGE_SIZE = 16  # so that the pixels of an image take more bytes than its feature
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_BUFFERS = (Tensor, torch.UntypedStorage, np.ndarray, Image.Image, io.BytesIO, mmap.mmap, ctypes.Array)
_TEXT = (str, bytes, bytearray)
_SIZED = (*_CONTAINERS, *_BUFFERS, *_TEXT, array, int)
_LIBRARIES = {"builtins", "typing", "lightning", "torch"}

INSTALLED = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
"""Folders of modules that are not own code. A program may add some that no strategy imports from."""

_Found = dict[int, Any]  # objects by their ids


def _by_id(objects: Iterable[Any]) -> _Found:
    """Return ``objects`` by their ids, each once."""
    objects = list(objects)
    return dict(zip(map(id, objects), objects, strict=True))


@dataclass(frozen=True)
class Kept:
    """What a strategy keeps of training images after their experience.

    Attributes:
        strategy: The strategy, after two experiences.
        in_memory: Bytes in memory for each image, wherever they are.
        in_files: Bytes written to files for each image.
        files: Files that were opened for writing.
        feature: Bytes of a feature in double precision.
    """

    strategy: Strategy
    in_memory: float
    in_files: float
    files: list[str]
    feature: int


def kept(subject: Subject) -> Kept:
    """Train ``subject`` on few images and on twice as many, and compare what is left of them.

    The two trainings differ only in the number of images of each class. Directions that a memory protects may
    differ too: other claims bound them. A training before both fills the caches of libraries.
    """
    gc.freeze()
    try:
        _learn(_built(subject, _FEW_IMAGES))
        own = _OwnCode(subject.strategy_class)
        few, many = (_left(subject, number, own) for number in (_FEW_IMAGES, 2 * _FEW_IMAGES))
    finally:
        gc.unfreeze()
    strategy = many.strategy
    further = _FEW_IMAGES * strategy.head.num_classes
    return Kept(
        strategy,
        (many.in_memory - few.in_memory) / further,
        (many.in_files - few.in_files) / further,
        many.files,
        8 * strategy.backbone.feature_dim,
    )


@dataclass(frozen=True)
class _Left:
    """What one training left: bytes in memory and in files, and the names of these."""

    strategy: Strategy
    in_memory: int
    in_files: int
    files: list[str]


def _built(subject: Subject, images_per_class: int) -> Run:
    return subject.run(
        {
            "data.num_experiences": 2,
            "data.classes_per_experience": 10,
            "data.images_per_class": images_per_class,
            "data.image_size": _IMAGE_SIZE,
            "backbone.options": subject.backbone_options(img_size=_IMAGE_SIZE),
            "trainer.max_epochs": 1,
        }
    )


def _learn(run: Run) -> _Written:
    """Train on the whole stream, and return what was written."""
    with _writing() as written:
        for experience in run.experiences:
            run.learn(experience)
    return written


def _left(subject: Subject, images_per_class: int, own: _OwnCode) -> _Left:
    gc.freeze()  # the collector then lists only newer objects, which makes a measurement cheap
    run = _built(subject, images_per_class)
    before = _alive(run, own)
    written = _learn(run)
    in_memory = _alive(run, own) - before
    memory = memory_of(run.strategy)
    in_memory -= 0 if memory is None else state_bytes(memory)
    return _Left(run.strategy, in_memory, written.bytes, sorted(written.files))


class _OwnCode:
    """The modules that are not installed, and whatever they hold.

    Args:
        strategy: The class under check, whose package is included even if it is installed.
    """

    def __init__(self, strategy: type[Strategy]) -> None:
        packages = {class_.__module__.partition(".")[0] for class_ in strategy.__mro__} - _LIBRARIES
        installed = tuple(INSTALLED)
        self._globals: _Found = {}
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if name.partition(".")[0] in packages or (file and not file.startswith(installed)):
                self._globals[id(vars(module))] = vars(module)
        # A loader may hold much more than its module: that of pytest holds all tests.
        self._loading = {
            id(names.get(name)) for names in self._globals.values() for name in ("__loader__", "__spec__")
        }
        names = [one for names in self._globals.values() for one in names.values()]
        modules = {id(one): vars(one) for one in names if type(one) is ModuleType}
        self._imported = [names for names in modules.values() if id(names) not in self._globals]

    def objects(self) -> list[Any]:
        """Return the containers, instances, classes and functions that are reached from the modules.

        Of the installed modules that they import, these are the globals and the containers among them; no
        other class or function of an installed package is looked into.
        """
        found = _by_id(self._imported)
        for names in self._imported:
            found |= _by_id(one for one in names.values() if type(one) in _CONTAINERS)
        reached = list(self._globals.values())
        while reached:
            reached = [one for one in _referents(reached, found) if self._is_open(one)]
            found |= _by_id(reached)
        return list(found.values())

    def _is_open(self, one: Any) -> bool:
        """Return whether an object is looked into."""
        if not gc.is_tracked(one) or id(one) in self._loading:
            return False
        kind = type(one)
        if kind is FunctionType:
            return id(one.__globals__) in self._globals
        if issubclass(kind, type):
            return id(vars(sys.modules.get(one.__module__, sys))) in self._globals
        return not issubclass(kind, ModuleType | CodeType | BuiltinFunctionType)


def _referents(objects: list[Any], found: _Found) -> list[Any]:
    """Return what ``objects`` refer to directly, each object once, without those in ``found``."""
    referents = _by_id(gc.get_referents(*objects))
    return [referents[key] for key in referents.keys() - found.keys()]


def _alive(run: Run, own: _OwnCode) -> int:
    """Return the bytes of tensors, arrays, text and containers in new objects and in own code.

    Whatever they refer to is found, wherever that is: attributes, closures, the trainer, the data.
    """
    run.stream.train.read.clear()
    run.stream.test.read.clear()
    gc.collect()
    holders = [*gc.get_objects(), *own.objects()]
    found = _by_id(holders)
    while holders:
        referents = _referents(holders, found)
        found |= _by_id(referents)
        # The collector does not track containers of nothing but numbers and text.
        holders = [one for one in referents if type(one) in _CONTAINERS and not gc.is_tracked(one)]
    kinds = set(map(type, found.values()))
    objects: dict[type, list[Any]] = {kind: [] for kind in kinds if issubclass(kind, _SIZED)}
    for one in found.values():
        if (kind := type(one)) in objects:
            objects[kind].append(one)
    buffers = [one for kind, ones in objects.items() if issubclass(kind, _BUFFERS) for one in ones]
    plain = [_bytes(kind, ones) for kind, ones in objects.items() if not issubclass(kind, _BUFFERS)]
    return sum(plain) + sum(dict(map(_memory, buffers)).values())


def _bytes(kind: type, objects: list[Any]) -> int:
    """Return the bytes of different objects of a kind; 8 for each entry of a container."""
    if issubclass(kind, int):
        return sum(one.bit_length() // 8 for one in objects)
    return sum(map(len, objects)) * (1 if issubclass(kind, _TEXT) else 8)


def _memory(one: Any) -> tuple[int, int]:
    """Return where the memory of a buffer is, which others may share, and its bytes."""
    kind = type(one)
    if issubclass(kind, Tensor) and one.layout == torch.strided:
        one = one.untyped_storage()
    if isinstance(one, torch.UntypedStorage):
        in_memory = one.device.type == "cpu"  # that of a tensor which compiling has traced is not
        return (one.data_ptr(), one.nbytes()) if in_memory else (id(one), 0)
    if issubclass(kind, io.BytesIO):
        return id(one), one.getbuffer().nbytes
    if issubclass(kind, mmap.mmap | ctypes.Array):
        return id(one), len(memoryview(one).cast("B"))
    if issubclass(kind, np.ndarray):
        while isinstance(one.base, np.ndarray):
            one = one.base
        return one.ctypes.data, one.nbytes
    if issubclass(kind, Image.Image):
        return id(one), one.width * one.height * len(one.getbands())
    return id(one), 0


class _Written:
    """What this process wrote to files.

    Attributes:
        files: Names of the files that Python opened for writing.
        bytes: Bytes that were written; on Linux also by libraries.
    """

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.bytes = 0


_watching: list[_Written] = []


@cache
def _install_audit() -> None:
    """Let Python report the files that it opens; an audit hook stays as long as the process."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if _watching and event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            if not isinstance(arguments[0], int):
                _watching[-1].files.add(os.fsdecode(arguments[0]))

    sys.addaudithook(audit)


@contextmanager
def _writing() -> Iterator[_Written]:
    """Watch what is written to files while the context is open; what is printed does not count."""
    _install_audit()
    written = _Written()
    _watching.append(written)
    before = _bytes_written()
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield written
    finally:
        _watching.pop()
    sizes = [os.path.getsize(file) for file in written.files if os.path.isfile(file)]
    written.bytes = max(sum(sizes), _bytes_written() - before)


def _bytes_written() -> int:
    """Return the bytes that this process has written so far, by Linux's count; 0 on other systems."""
    try:
        counts = Path("/proc/self/io").read_text()
    except OSError:
        return 0
    return int(counts.partition("wchar:")[2].split()[0])
