"""What the four benchmarks share: a root to read from, and the transforms of a published codebase."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.data import manifest
from cl_bench.data.cache import CachedSource, CacheKind, description
from cl_bench.data.regions import BatchedView
from cl_bench.data.sources import FileSource, Source, Sources
from cl_bench.data.stream import Transform
from cl_bench.data.views import NORMALISATION, Preset, PresetName, RandomView, preset

Augmentation = Literal["exact", "batched"]


class Photographs(StreamDataModule):
    """A published dataset below a root, seen through a transform preset.

    A dataset is a subclass with a ``name`` that implements :meth:`sources`.

    Args:
        root: Folder that ``cl-bench prepare`` filled.
        transforms: Codebase whose training and test transforms are used: inflora, pilot or clip.
        augmentation: exact, each training view by Pillow as in published code; batched, crops drawn alike and
            resized batch by batch on the training device. Test views are exact in either case.
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
        augmentation: Augmentation = "exact",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.transforms = transforms
        self.augmentation = augmentation

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
        view = self._preset.train
        return BatchedView(view) if self.augmentation == "batched" and isinstance(view, RandomView) else view

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


class PhotographFiles(Photographs):
    """A published dataset of image files, which may be decoded once and kept.

    Args:
        cache: none, every image is decoded each time; pixels, it is kept resized, uint8 in a memory-mapped
            file; jpeg, likewise, re-encoded. Training crops of the last two are cut out of the resized image.
        cache_dir: Where caches are kept; below the root if null.
        augmentation: As in every dataset of photographs; batched takes a cache.
        kwargs: As in every dataset of photographs.
    """

    def __init__(
        self,
        *,
        cache: CacheKind = "none",
        cache_dir: str | None = None,
        augmentation: Augmentation = "exact",
        **kwargs: Any,
    ) -> None:
        super().__init__(augmentation=augmentation, **kwargs)
        self.cache = cache
        self.cache_dir = cache_dir

    @property
    def decoding(self) -> str:  # type: ignore[override]
        """How stored images become pixels."""
        if self.cache == "none":
            return super().decoding
        by_torch = self.cache == "pixels" and self.augmentation == "exact"
        crops = "; training crops resized by torch in uint8" if by_torch else ""
        return f"{super().decoding}, {description(self.cache, self._preset.test)}{crops}"

    @property
    def images_sha256(self) -> str | None:
        """That of the variant, by the manifest in the root."""
        names = [f"{name} {value}" for name, value in self.variants.items()]
        prepared = manifest.variants(Path(self.root), self.name)
        return next((variant.images_sha256 for variant in prepared if variant.name in names), None)

    def ready(self, sources: Sources) -> Sources:
        """Return ``sources`` with the cache in front, of the test images only where they are opened.

        Raises:
            ValueError: If augmentation is batched without a cache, or an image cannot be decoded.
            OSError: If the disk has no room for the cache.
        """
        if self.cache == "none":
            if self.augmentation == "batched":
                raise ValueError(
                    "Batched augmentation of images at their own sizes would leave out most pixels of large "
                    "ones: set --cache to pixels or jpeg, or --augmentation to exact."
                )
            return sources
        test = sources.test if self.val_fraction else self._cached(sources.test)
        return replace(sources, train=self._cached(sources.train), test=test)

    def _cached(self, source: Source) -> CachedSource:
        assert isinstance(source, FileSource)
        folder = Path(self.cache_dir) if self.cache_dir else Path(self.root) / ".cl-bench-cache"
        return CachedSource(source, self.cache, self._preset.test, folder)
