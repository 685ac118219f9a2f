"""How a result was made: versions, commit, device, threads. Reports show it; no hash includes it."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torchvision", "lightning", "timm", "avalanche-lib", "numpy")


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
