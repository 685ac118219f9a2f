"""How a result was made: versions, commit, device, threads. Reports show it; no hash includes it."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.data.manifest import fingerprint
from cl_bench.data.sources import FileSource, for_validation, of_classes
from cl_bench.results.result import Result

_PACKAGES = ("torchvision", "lightning", "timm", "avalanche-lib", "numpy")
_OF_FILES = ("images_sha256", "sizes_sha256", "ends_sha256")
_END = 64 * 1024  # bytes


def provenance(device: torch.device) -> dict[str, Any]:
    """Return versions, commit, device and threads of this process, as plain JSON."""
    return {
        "python": platform.python_version(),
        # torch's own version also names the build: a CPU and a CUDA build sum in different orders.
        "versions": {"torch": str(torch.__version__)} | {package: version(package) for package in _PACKAGES},
        "commit": commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def circumstances(made: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the bits of a run depend on besides its cell; if one of these differs, the bits may.

    Args:
        made: Provenance of the run, with its number of ``processes``.
    """
    named = {name: made[name] for name in ("commit", "device", "threads", "processes")}
    return {**made["versions"], **named, "processor": torch.backends.cpu.get_cpu_capability()}


def file_hashes(data: StreamDataModule) -> dict[str, str]:
    """Return two hashes of all image files by their names in a result: of their sizes, and of their ends.

    The second, ``ends_sha256``, is also over the first and the last 64 KiB of each file, so all of most: a
    file may be replaced by one of its size, as uncompressed images are. Results from before it was recorded
    are compared by ``sizes_sha256``. Nothing is returned if the images are not files, or if a hash of all
    their bytes is known.
    """
    sources = [source for source in (data.found.train, data.found.test) if isinstance(source, FileSource)]
    if data.images_sha256 is not None or not sources:
        return {}
    files = [(path, *_ends(source.root / path)) for source in sources for path in source.files]
    return {
        "sizes_sha256": fingerprint(f"{path}\t{size}" for path, size, _ in files),
        "ends_sha256": fingerprint(f"{path}\t{size}\t{ends}" for path, size, ends in files),
    }


def _ends(path: Path) -> tuple[int, str]:
    """Return the size of a file, and the sha256 of its first and its last bytes."""
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        found = hashlib.sha256(file.read(_END))
        if size > _END:
            file.seek(max(_END, size - _END))
            found.update(file.read(_END))
    return size, found.hexdigest()


def data_hashes(data: StreamDataModule) -> dict[str, str]:
    """Return the hashes of the images of a stream by their names in a result, before the stream is dealt.

    Raises:
        ValueError: If the data cannot be used.
        FileNotFoundError: If they are missing.
    """
    sources = data.found
    if data.held_out_classes:
        sources = of_classes(sources, range(len(sources.class_names) - data.held_out_classes))
    sources = for_validation(sources, data.val_fraction, data.val_seed)
    hashes = {"train_images": sources.train.fingerprint, "test_images": sources.test.fingerprint}
    return hashes | _known(images_sha256=data.images_sha256) | file_hashes(data)


def recorded_hashes(result: Result) -> dict[str, str]:
    """Return those hashes of the images of a result that were recorded."""
    lists = {name: result.protocol.identity.get(name) for name in ("train_images", "test_images")}
    of_files = {name: result.provenance.get(name) for name in _OF_FILES}
    return _known(**lists, **of_files)


def differing_images(one: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """Return in words which images differ between two sets of hashes; None if no hash that both hold does.

    >>> differing_images({"train_images": "a", "sizes_sha256": "b"}, {"train_images": "c"})
    'other training images'
    """
    words = {
        "train_images": "other training images",
        "test_images": "other images to evaluate",
        "images_sha256": "images with other bytes",
        "sizes_sha256": "images with other sizes in bytes",
        "ends_sha256": "images with other bytes",
    }
    shared = one.keys() & other.keys()
    return next((words[name] for name in words if name in shared and one[name] != other[name]), None)


def _known(**hashes: str | None) -> dict[str, str]:
    return {name: value for name, value in hashes.items() if value is not None}


def device_name(device: torch.device) -> str:
    """Return the kind of the device, with the model of an accelerator."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def commit() -> str | None:
    """Return the commit of this checkout, with ``+`` if files differ from it; None outside git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    revision = _git(root, "rev-parse", "--short=12", "HEAD")
    if revision is None:
        return None
    return f"{revision}+" if _git(root, "status", "--porcelain") else revision


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False, timeout=10
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):  # without git, the commit is unknown
        return None
    return done.stdout.strip() if done.returncode == 0 else None
