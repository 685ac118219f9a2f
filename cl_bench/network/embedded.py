"""A small vision transformer of our own, pre-trained on images that formulas draw.

``notebooks/pretraining/README.md`` describes how.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

OPTIONS: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 192,
    "depth": 4,
    "num_heads": 3,
    "class_token": False,
    "global_pool": "avg",
}
"""Options of timm's VisionTransformer."""

SHA256 = "96ad5b1318a38e00d99a80e530dcac71f6b1dde27eaf69c93e222773444efd09"
"""Sha256 of the file of weights."""


def weights_file() -> Path:
    """Return the file of weights, once its sha256 is known to be right.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is another one.
    """
    file = Path(__file__).with_name("vit.safetensors")
    if not file.is_file():
        raise FileNotFoundError(f"The embedded weights {file} are missing: check out or reinstall the suite.")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"The embedded weights {file} have the sha256 {found[:16]}… instead of {SHA256[:16]}…: "
            "check out or reinstall the suite."
        )
    return file
