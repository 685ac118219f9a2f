"""A second device, once registered, stays in its process: these tests run only when they are named."""

from __future__ import annotations

from pathlib import Path

import pytest

collect_ignore = ["faults.py", "twin.py"]  # doctests would import them a second time


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the folder out unless the command names it, as ``pytest tests/devices`` does."""
    named = any("devices" in str(argument) for argument in config.invocation_params.args)
    return None if named else True
