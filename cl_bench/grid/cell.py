"""One cell, as it travels between processes: to hand it on, a worker imports nothing of the stack."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cl_bench.run.configuration import Configuration


@dataclass(frozen=True)
class Cell:
    """One cell by the words of its command, small enough to hand to another process.

    Attributes:
        strategy: Config stem or path.
        dataset: Config stem or path.
        overrides: Command-line words.
    """

    strategy: str
    dataset: str
    overrides: tuple[str, ...]

    def configuration(self) -> Configuration:
        """Resolve the cell."""
        from cl_bench.run.configuration import layers, resolve

        return resolve(layers(self.strategy, self.dataset), self.overrides)

    @property
    def command(self) -> str:
        """The command that runs this cell alone."""
        return shlex.join(("cl-bench", "run", self.strategy, self.dataset, *self.overrides))
