"""What a launcher such as ``fabric run`` or ``torchrun`` has started, by the variables that it sets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

_LAUNCHED = "TORCHELASTIC_RUN_ID"
# What `fabric run` was told, and the option of the trainer that says the same.
_OF_FABRIC = {
    "LT_ACCELERATOR": "accelerator",
    "LT_DEVICES": "devices",
    "LT_NUM_NODES": "num_nodes",
    "LT_PRECISION": "precision",
    "LT_STRATEGY": "strategy",
}


def launched(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many processes a launcher has started for this run, 1 without one."""
    return int(environment["WORLD_SIZE"]) if _LAUNCHED in environment else 1


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return the place of this process in its run, by variables that Lightning sets too; 0 alone."""
    return int(environment.get("RANK", environment.get("LOCAL_RANK", "0")))


def with_launcher(options: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return a command's options with those that the variables of its launcher stand for.

    Raises:
        ValueError: If the command says by itself what is the launcher's to say.

    >>> two = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    >>> with_launcher(["--rank", "4"], two)
    ['--rank', '4', '--trainer.devices=2', '--trainer.num_nodes=1', '--trainer.strategy=ddp']
    >>> with_launcher(["--rank", "4"], {})
    ['--rank', '4']
    """
    if launched(environment) == 1:
        return list(options)
    for option in options:
        name = option.partition("=")[0].removeprefix("--").removeprefix("trainer.")
        if name in ("devices", "num_nodes"):
            raise ValueError(
                f"The launcher started {launched(environment)} processes, and --{name} is its to say: "
                "leave it out."
            )
    here = int(environment["LOCAL_WORLD_SIZE"])
    found: dict[str, Any] = {"devices": here, "num_nodes": launched(environment) // here, "strategy": "ddp"}
    if "LT_CLI_USED" in environment:
        found |= {option: environment[name] for name, option in _OF_FABRIC.items() if name in environment}
    return [*options, *(f"--trainer.{option}={value}" for option, value in found.items())]
