"""cl-bench: class-incremental learning with pre-trained vision transformers, without rehearsal."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULES = {"compare": "cl_bench.compared", "load": "cl_bench.export.loading"}


def __getattr__(name: str) -> Any:
    """Import what is used when it is used: the command line starts without torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with warnings.catch_warnings():  # libraries warn on import, for instance of what a notebook lacks
        warnings.simplefilter("ignore")
        return getattr(import_module(_MODULES[name]), name)
