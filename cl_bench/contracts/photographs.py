"""What the four benchmarks share: a root with the data, and the transforms of a published codebase."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.data import manifest
from cl_bench.data.cache import CachedSource, CacheKind, description
from cl_bench.data.decoding import require_readable
from cl_bench.data.sources import FileSource, Source, Sources
from cl_bench.data.stream import Transform
from cl_bench.data.views import NORMALISATION, Preset, PresetName, preset


class Photographs(StreamDataModule):
    """A published dataset below a root, transformed by a preset.

    A dataset is a subclass with a ``name`` that implements :meth:`sources`.

    Args:
        root: Folder that ``cl-bench prepare`` filled.
        transforms: Codebase whose training and test transforms are used: inflora, pilot or clip.
        augmentation: exact, the only value; every cell holds it.
        kwargs: As in every dataset.
    """

    decoding = "Pillow, converted to RGB"

    whole_test_images: bool = False
    """Whether the preset ``inflora`` shows whole test images of this dataset."""

    def __init__(
        self,
        *,
        root: str = "",
        transforms: PresetName = "inflora",
        augmentation: str = "exact",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.transforms = transforms
        self.augmentation = augmentation

    @property
    def variants(self) -> dict[str, str]:
        """The transforms; a dataset with other choices adds them."""
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

    def _require_valid_arguments(self) -> None:
        super()._require_valid_arguments()
        if self.augmentation != "exact":
            raise ValueError(
                f"augmentation is {self.augmentation}, and only exact exists: remove the option, and set "
                "--cache pixels to load images faster."
            )

    @cached_property
    def _preset(self) -> Preset:
        return preset(self.transforms, self.image_size, whole=self.whole_test_images)

    def _existing_root(self) -> Path:
        """Return the root.

        Raises:
            ValueError: If no root is given.
            FileNotFoundError: If it does not exist.
        """
        if not self.root:
            raise ValueError(
                f"No root is given: fetch the data with cl-bench prepare {self.name} --root FOLDER, "
                "and run with --root FOLDER."
            )
        root = Path(self.root)
        if not root.is_dir():
            raise FileNotFoundError(f"The folder {root} does not exist: {self._remedy}")
        return root

    @property
    def _remedy(self) -> str:
        return f"fetch the data with cl-bench prepare {self.name} --root {self.root}"


class PhotographFiles(Photographs):
    """A published dataset of image files, which can be decoded once and cached.

    Args:
        cache: none, to decode an image each time; pixels, to store it resized, in uint8, in a memory-mapped
            file; jpeg, to store it resized and re-encoded. Training views are then cropped from the resized
            image.
        cache_dir: Folder of the caches; below the root if null.
        kwargs: As in every dataset of photographs.
    """

    def __init__(
        self,
        *,
        cache: CacheKind = "none",
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.cache = cache
        self.cache_dir = cache_dir

    @property
    def decoding(self) -> str:  # type: ignore[override]
        """How stored images become pixels."""
        if self.cache == "none":
            return super().decoding
        crops = "; training crops resized by torch in uint8" if self.cache == "pixels" else ""
        return f"{super().decoding}, {description(self.cache, self._preset.test)}{crops}"

    @property
    def images_sha256(self) -> str | None:
        """Hash over the image files of the variant, from the manifest in the root; None if it has none."""
        names = [f"{name} {value}" for name, value in self.variants.items()]
        prepared = manifest.variants(Path(self.root), self.name)
        return next((variant.images_sha256 for variant in prepared if variant.name in names), None)

    def ready(self, sources: Sources) -> Sources:
        """Return ``sources`` with the cache in front, or check that their files can be read.

        A manifest shows which files have changed since they were decoded; without one, headers and ends of
        files are read. Building a cache decodes them all. Test images are read only if they are evaluated on.

        Raises:
            ValueError: If an image cannot be decoded.
            OSError: If the disk has too little room for the cache.
        """
        if self.cache == "none":
            for source in (sources.train,) if self.val_fraction else (sources.train, sources.test):
                self._require_readable(source)
            return sources
        test = sources.test if self.val_fraction else self._cached(sources.test)
        return replace(sources, train=self._cached(sources.train), test=test)

    def _require_readable(self, source: Source) -> None:
        assert isinstance(source, FileSource)
        found = self._manifest
        if found is None:
            require_readable(source.root, source.files)
            return
        used = set(source.files)
        if changed := manifest.changed(source.root, (one for one in found.images if one.path in used)):
            raise ValueError(
                f"{changed} below {source.root} is not the file that cl-bench prepare decoded: {self._remedy}"
            )

    @cached_property
    def _manifest(self) -> manifest.Manifest | None:
        return manifest.read(Path(self.root), self.name)

    def _cached(self, source: Source) -> CachedSource:
        assert isinstance(source, FileSource)
        folder = Path(self.cache_dir) if self.cache_dir else Path(self.root) / ".cl-bench-cache"
        return CachedSource(source, self.cache, self._preset.test, folder)
