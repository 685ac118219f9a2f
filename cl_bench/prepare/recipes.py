"""How each benchmark is prepared: its archives, its images, and its variants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cl_bench.data.manifest import Scanned, Variant, fingerprint, images_sha256
from cl_bench.data.published import cifar100, domainnet, imagenet100, imagenet_r
from cl_bench.data.published.imagenet100 import Classes, Split
from cl_bench.data.sources import PixelSource, require_files
from cl_bench.prepare.archives import CIFAR100, DOMAINNET, IMAGENET_R, Archive

Images = Mapping[str, Scanned]
"""The scanned images, by path below the root."""

_IMAGENET_SPLITS: tuple[Split, ...] = ("train", "val")


@dataclass(frozen=True)
class Recipe:
    """How one dataset is prepared.

    Attributes:
        name: Name of the dataset.
        archives: Archives to fetch, in this order.
        images: Function of the root that returns the paths of all image files below it.
        variants: Function of the root and its scanned images that returns the variants.
    """

    name: str
    archives: tuple[Archive, ...]
    images: Callable[[Path], Sequence[str]]
    variants: Callable[[Path, Images], list[Variant]]


def _imagenet_r_images(root: Path) -> list[str]:
    files = [f"{imagenet_r.FOLDER}/{file}" for file in imagenet_r.files()]
    _require(root, files)
    return files


def _imagenet_r_variants(root: Path, images: Images) -> list[Variant]:
    classes = len(imagenet_r.wnids("sorted"))
    return [
        _variant(f"split {name}", *imagenet_r.split(name), classes, images.values())
        for name in imagenet_r.SPLITS
    ]


def _cifar100_variants(root: Path, images: Images) -> list[Variant]:
    train, test = (PixelSource(*cifar100.images(root, split)) for split in ("train", "test"))
    classes = len(cifar100.names(root))
    return [Variant("cifar100", len(train), len(test), classes, train.fingerprint, test.fingerprint)]


def _domainnet_images(root: Path) -> list[str]:
    files = [
        file for split in ("train", "test") for file in domainnet.listed(root, split, domainnet.DOMAINS).files
    ]
    _require(root, files)
    return files


def _domainnet_variants(root: Path, images: Images) -> list[Variant]:
    variants = []
    for name in domainnet.VARIANTS:
        train, test = (
            domainnet.listed(root, split, domainnet.domains(name)).files for split in ("train", "test")
        )
        found = _of_files([*train, *test], images)
        variants.append(_variant(f"variant {name}", train, test, len(domainnet.names()), found))
    return variants


def imagenet100_images(root: Path, wnids: Sequence[str]) -> list[str]:
    """Return the paths of all images of ``wnids`` below ``root``.

    Raises:
        FileNotFoundError: If a class is missing.
        ValueError: If a class is incomplete.
    """
    return [
        file for split in _IMAGENET_SPLITS for wnid in wnids for file in imagenet100.images(root, split, wnid)
    ]


def imagenet100_variants(root: Path, images: Images, names: Sequence[Classes]) -> list[Variant]:
    """Return the variants called ``names``.

    Raises:
        FileNotFoundError: If a class is missing.
        ValueError: If a class is incomplete.
    """
    variants = []
    for name in names:
        wnids = imagenet100.wnids(name)
        train, test = (
            [file for wnid in wnids for file in imagenet100.images(root, split, wnid)]
            for split in _IMAGENET_SPLITS
        )
        found = _of_files([*train, *test], images)
        variants.append(_variant(f"classes {name}", train, test, len(wnids), found))
    return variants


def imagenet100_complete(root: Path) -> list[Classes]:
    """Return the names of the variants whose classes are all complete below ``root``."""
    complete = []
    for name in imagenet100.VARIANTS:
        try:
            imagenet100_images(root, imagenet100.wnids(name))
        except (FileNotFoundError, ValueError):
            continue
        complete.append(name)
    return complete


def _variant(
    name: str, train: Sequence[str], test: Sequence[str], classes: int, images: Iterable[Scanned]
) -> Variant:
    lists = fingerprint(train), fingerprint(test)
    return Variant(name, len(train), len(test), classes, *lists, images_sha256(images))


def _of_files(files: Sequence[str], images: Images) -> list[Scanned]:
    for file in files:
        if file not in images:
            raise ValueError(f"The image {file} has not been scanned: run again.")
    return [images[file] for file in files]


def _require(root: Path, files: Sequence[str]) -> None:
    require_files(root, files, "remove the incomplete folder and run again to unpack it.")


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("cifar100", CIFAR100, lambda root: [], _cifar100_variants),
        Recipe("imagenet_r", IMAGENET_R, _imagenet_r_images, _imagenet_r_variants),
        Recipe("domainnet", DOMAINNET, _domainnet_images, _domainnet_variants),
    )
}
"""Recipes of the datasets that can be fetched, by name."""

NAMES = (*RECIPES, "imagenet100")
"""Names of all datasets that can be prepared."""
