"""What every test relies on: no network, no display, and development data where a machine has it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Two processes of one thread each outrun one process whose threads wait for each other on a busy machine.
torch.set_num_threads(1)

# Read when matplotlib, wandb and huggingface_hub are first imported, so set before any test module is.
os.environ |= {"MPLBACKEND": "Agg", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}


CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def checkout() -> Path:
    """Root of this checkout."""
    return CHECKOUT


@pytest.fixture(scope="session")
def development_data() -> Path:
    """Folder of a real stream and a small pretrained backbone, too large to commit."""
    folder = Path(os.environ.get("CL_BENCH_DEVELOPMENT_DATA", CHECKOUT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(
            f"There is no development data at {folder}: name its folder in CL_BENCH_DEVELOPMENT_DATA."
        )
    return folder
