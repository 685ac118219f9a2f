"""Avalanche's benchmarks, imported without the folder that Avalanche makes in the home folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from unittest.mock import patch

_OWN = "~/.avalanche"

if Path(_OWN, "config.json").expanduser().exists():
    from avalanche.benchmarks import nc_benchmark
else:
    # Avalanche writes its settings, where it would put downloads, when it is imported. Nothing here downloads
    # with it, and the home folder may be read-only or missing.
    with tempfile.TemporaryDirectory() as _folder:
        _expanded = os.path.expanduser

        def _elsewhere(path: str) -> str:
            return path.replace(_OWN, _folder) if str(path).startswith(_OWN) else _expanded(path)

        with patch("os.path.expanduser", _elsewhere):
            from avalanche.benchmarks import nc_benchmark

__all__ = ["nc_benchmark"]
