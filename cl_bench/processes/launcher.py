"""What a launcher such as ``fabric run`` or ``torchrun`` has started, by the variables that it sets."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

_LAUNCHED = "TORCHELASTIC_RUN_ID"
# Variables of `fabric run`, and the options of the trainer with the same meaning.
_OF_FABRIC = {
    "LT_ACCELERATOR": "accelerator",
    "LT_DEVICES": "devices",
    "LT_NUM_NODES": "num_nodes",
    "LT_PRECISION": "precision",
    "LT_STRATEGY": "strategy",
}


def launched(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many processes a launcher has started for this run; 1 without a launcher."""
    return int(environment["WORLD_SIZE"]) if _LAUNCHED in environment else 1


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return the rank of this process in its run, read from variables that Lightning sets as well."""
    return int(environment.get("RANK", environment.get("LOCAL_RANK", "0")))


def is_single(
    devices: Any, num_nodes: int, strategy: Any, environment: Mapping[str, str] = os.environ
) -> bool:
    """Return whether flags of the trainer and the launcher ask for a run in one process.

    Args:
        devices: As the trainer takes them.
        num_nodes: As the trainer takes them.
        strategy: As the trainer takes it.
        environment: The variables of this process.

    >>> is_single(1, 1, "auto", {"SLURM_NTASKS": "4"}), is_single(2, 1, "ddp", {})
    (True, False)
    """
    one = str(devices) == "1" or (isinstance(devices, list) and len(devices) == 1)
    return one and num_nodes == 1 and strategy == "auto" and launched(environment) == 1


def with_launcher(options: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return a command's options, extended by those that the variables of its launcher imply.

    Raises:
        ValueError: If the command sets an option otherwise than the launcher, which decides.

    >>> two = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    >>> with_launcher(["--rank", "4"], two)
    ['--rank', '4', '--trainer.devices=2', '--trainer.num_nodes=1', '--trainer.strategy=ddp']
    >>> with_launcher(["--rank", "4"], {})
    ['--rank', '4']
    """
    if launched(environment) == 1:
        return list(options)
    here = int(environment["LOCAL_WORLD_SIZE"])
    found: dict[str, Any] = {"devices": here, "num_nodes": launched(environment) // here, "strategy": "ddp"}
    if "LT_CLI_USED" in environment:
        found |= {option: environment[name] for name, option in _OF_FABRIC.items() if name in environment}
    for option, following in itertools.zip_longest(options, options[1:], fillvalue=""):
        key, equals, value = option.partition("=")
        name = key.removeprefix("--").removeprefix("trainer.")
        if option.startswith("--") and name in found and (value if equals else following) != str(found[name]):
            raise ValueError(
                f"The launcher started {launched(environment)} processes and decides --{name}, which is "
                f"{found[name]} here: remove the option, or give it to the launcher."
            )
    return [*options, *(f"--trainer.{option}={value}" for option, value in found.items())]
