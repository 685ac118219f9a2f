"""The classes of ImageNet-100, from the folders or the original tars of ImageNet-1k.

ImageNet-1k cannot be fetched automatically: a person with an account must accept its terms.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cl_bench.data.published import imagenet100
from cl_bench.data.published.imagenet100 import Split
from cl_bench.prepare.archives import (
    IMAGENET_DEVKIT,
    IMAGENET_TRAIN,
    IMAGENET_VAL,
    Advance,
    Archive,
    require_whole,
)
from cl_bench.prepare.unpacking import require_space, staging, unpack_tar

INSTRUCTIONS = f"""Fetching ImageNet-1k requires an account. Once:
  1. Register at https://image-net.org/download-images and accept its terms.
  2. From ILSVRC2012 fetch {IMAGENET_TRAIN.name} (148 GB), {IMAGENET_VAL.name} (6.7 GB)
     and {IMAGENET_DEVKIT.name} into one folder. Folders train/<wnid> and val/<wnid> work as well.
  3. Run: cl-bench prepare imagenet100 --root FOLDER --source WHERE_THEY_ARE
Only the classes of ImageNet-100 are unpacked."""

_DEVKIT_META = "data/meta.mat"
_DEVKIT_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")

Progress = Callable[[str, int], Advance]
"""Called with the name of a step and its number of bytes; returns the callback for the bytes processed."""

Unpack = Callable[[Path, Path, Sequence[str], Progress], None]


class Missing(FileNotFoundError):
    """ImageNet-1k, or a part of it, is missing; a person must fetch it."""


def build(source: Path, root: Path, wnids: Sequence[str], begin: Progress) -> None:
    """Put the images of ``wnids`` into ``train/<wnid>`` and ``val/<wnid>`` below ``root``.

    Each folder appears when it is complete. Existing folders are left as they are.

    Args:
        source: Folder with folders or tars; it may be the root.
        root: Folder to fill.
        wnids: WordNet ids of the classes.
        begin: Shows progress.

    Raises:
        Missing: If a class is in neither folders nor tars.
        ValueError: If a tar is not the published one, or a class folder is incomplete.
        OSError: If the disk has too little space.
    """
    parts: tuple[tuple[Split, Archive, Unpack], ...] = (
        ("train", IMAGENET_TRAIN, _unpack_train),
        ("val", IMAGENET_VAL, _unpack_val),
    )
    for split, archive, unpack in parts:
        (root / split).mkdir(exist_ok=True)
        absent = [wnid for wnid in wnids if not (root / split / wnid).is_dir()]
        in_folders = [wnid for wnid in absent if (source / split / wnid).is_dir()]
        if in_folders:
            _copy(source, root, split, in_folders, begin)
        absent = [wnid for wnid in absent if wnid not in in_folders]
        if absent:
            _require_there(source, archive, split, absent)
            unpack(source, root, absent, begin)


def _require_there(source: Path, archive: Archive, split: str, absent: Sequence[str]) -> None:
    if not (source / archive.name).is_file():
        raise Missing(
            f"{source} holds neither {archive.name} nor a folder {split}/{absent[0]}, "
            f"and {len(absent)} classes are missing: name the folder of ImageNet-1k with --source."
        )


def _copy(source: Path, root: Path, split: Split, wnids: Sequence[str], begin: Progress) -> None:
    """Copy the images of complete class folders, by hard links if both are on one disk."""
    files = {wnid: imagenet100.images(source, split, wnid) for wnid in wnids}
    size = sum((source / file).stat().st_size for of_class in files.values() for file in of_class)
    if (source / split).stat().st_dev != root.stat().st_dev:
        require_space(root, size, f"to copy {len(wnids)} classes of {split}")
    advance = begin(f"copy {split}", size)
    with staging(root) as stage:
        for wnid, of_class in files.items():
            (stage / wnid).mkdir()
            for file in of_class:
                path = source / file
                _link_or_copy(path, stage / wnid / path.name)
                advance(path.stat().st_size)
            (stage / wnid).rename(root / split / wnid)


def _link_or_copy(path: Path, copy: Path) -> None:
    original = path.resolve()  # a link must not point outside the root
    try:
        os.link(original, copy)
    except OSError:
        shutil.copyfile(original, copy)


def _unpack_train(source: Path, root: Path, wnids: Sequence[str], begin: Progress) -> None:
    """Unpack the inner tars of ``wnids`` from the tar of all classes."""
    outer = source / IMAGENET_TRAIN.name
    require_whole(outer, IMAGENET_TRAIN, begin(f"check {outer.name}", outer.stat().st_size))
    with tarfile.open(outer, mode="r:") as classes:
        members = {member.name: member for member in classes if member.isfile()}
        missing = [wnid for wnid in wnids if f"{wnid}.tar" not in members]
        if missing:
            raise ValueError(f"{outer} has no {missing[0]}.tar: it is another archive, remove it.")
        inner = [members[f"{wnid}.tar"] for wnid in wnids]
        size = sum(member.size for member in inner)
        require_space(root, size, f"to unpack {len(wnids)} classes of train")
        advance = begin("unpack train", size)
        for wnid, member in zip(wnids, inner, strict=True):
            stream = classes.extractfile(member)
            assert stream is not None
            with staging(root) as stage:
                (stage / wnid).mkdir()
                unpack_tar(stream, outer / member.name, stage / wnid)
                (stage / wnid).rename(root / "train" / wnid)
            advance(member.size)


def _unpack_val(source: Path, root: Path, wnids: Sequence[str], begin: Progress) -> None:
    """Unpack the flat validation tar, and sort its images into classes by the development kit."""
    classes = _validation_classes(source)
    outer = source / IMAGENET_VAL.name
    require_whole(outer, IMAGENET_VAL, begin(f"check {outer.name}", outer.stat().st_size))
    with staging(root) as stage, tarfile.open(outer, mode="r:") as images:
        wanted = [(member, wnid) for member, wnid in _labelled(outer, images, classes) if wnid in wnids]
        size = sum(member.size for member, _ in wanted)
        require_space(root, size, f"to unpack {len(wnids)} classes of val")
        advance = begin("unpack val", size)
        for wnid in wnids:
            (stage / wnid).mkdir()
        for member, wnid in wanted:
            images.extract(member, stage / wnid, filter="data")
            advance(member.size)
        for wnid in wnids:
            (stage / wnid).rename(root / "val" / wnid)


def _labelled(
    outer: Path, images: tarfile.TarFile, classes: Sequence[str]
) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Yield every validation image with the WordNet id of its class."""
    for member in images:
        match = _VAL_NAME.fullmatch(member.name)
        if match is None or not member.isfile():
            raise ValueError(f"{outer} holds {member.name!r}, which is not an image of ImageNet: remove it.")
        yield member, classes[int(match[1]) - 1]


def _validation_classes(source: Path) -> list[str]:
    """Return the WordNet id of each validation image, by number."""
    from scipy.io import loadmat

    kit = source / IMAGENET_DEVKIT.name
    if not kit.is_file():
        raise Missing(
            f"{kit.name}, with the classes of the validation images, is missing from {source}: "
            "fetch it from the same place as the tars."
        )
    require_whole(kit, IMAGENET_DEVKIT)
    with tarfile.open(kit) as files:
        names = {member.name.partition("/")[2]: member for member in files}
        meta, truth = files.extractfile(names[_DEVKIT_META]), files.extractfile(names[_DEVKIT_TRUTH])
        assert meta is not None
        assert truth is not None
        synsets: Any = np.atleast_1d(loadmat(meta, squeeze_me=True)["synsets"])
        numbers = truth.read().split()
    leaves = synsets[synsets["num_children"] == 0]
    wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
    return [wnid_of[int(number)] for number in numbers]
