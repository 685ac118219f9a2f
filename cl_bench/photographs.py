"""What the four benchmarks share: a root to read from, and the transforms of a published codebase."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from cl_bench.datamodule import StreamDataModule
from cl_bench.stream import Transform
from cl_bench.views import NORMALISATION, Preset, PresetName, preset


class Photographs(StreamDataModule):
    """A published dataset below a root, seen through a transform preset.

    A dataset is a subclass with a ``name`` that implements :meth:`sources`.

    Args:
        root: Folder that ``cl-bench prepare`` filled.
        transforms: Codebase whose training and test transforms are used: inflora, pilot or clip.
        kwargs: As in every dataset.
    """

    decoding = "Pillow, converted to RGB"

    whole_test_images: bool = False
    """Whether the preset ``inflora`` shows whole test images of this dataset."""

    def __init__(self, *, root: str = "", transforms: PresetName = "inflora", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.transforms = transforms

    @property
    def variants(self) -> dict[str, str]:
        """Which of its published meanings the dataset has here."""
        return {"transforms": self.transforms}

    @property
    def published_normalisation(self) -> str:
        """The backbone's normalisation that the transforms were published with."""
        return NORMALISATION[self.transforms]

    def train_transform(self) -> Transform:
        """Return the preset's view for training."""
        return self._preset.train

    def test_transform(self) -> Transform:
        """Return the preset's view for testing."""
        return self._preset.test

    @cached_property
    def _preset(self) -> Preset:
        return preset(self.transforms, self.image_size, whole=self.whole_test_images)

    def _existing_root(self) -> Path:
        """Return the root.

        Raises:
            ValueError: If none is given.
            FileNotFoundError: If it does not exist.
        """
        if not self.root:
            raise ValueError(
                f"No root is given: fetch the data with cl-bench prepare {self.name} --root FOLDER, "
                "and run with --root FOLDER."
            )
        root = Path(self.root)
        if not root.is_dir():
            raise FileNotFoundError(f"There is no folder {root}: {self._remedy}")
        return root

    @property
    def _remedy(self) -> str:
        return f"fetch the data with cl-bench prepare {self.name} --root {self.root}"
