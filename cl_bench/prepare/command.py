"""The verb ``prepare``: it lists what it will fetch, fills the root, and lists the variants there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from cl_bench.data import manifest
from cl_bench.data.manifest import Variant
from cl_bench.data.published import imagenet100
from cl_bench.data.published.imagenet100 import Classes
from cl_bench.errors import suggestion
from cl_bench.prepare import imagenet
from cl_bench.prepare.archives import Advance, Archive, human, require_whole
from cl_bench.prepare.download import PATIENCE, Patience, download, received
from cl_bench.prepare.recipes import (
    NAMES,
    RECIPES,
    Images,
    Recipe,
    imagenet100_complete,
    imagenet100_images,
    imagenet100_variants,
)
from cl_bench.prepare.scanning import scan
from cl_bench.prepare.unpacking import STAGING, require_space, unpack

_LOCK = ".preparing"


def prepare(
    dataset: str,
    root: Path,
    console: Console,
    *,
    offline: bool = False,
    source: Path | None = None,
    classes: Sequence[Classes] = imagenet100.VARIANTS,
    patience: Patience = PATIENCE,
) -> list[Variant]:
    """Fill ``root`` with a verified dataset; complete files are kept, and nothing is done twice.

    Args:
        dataset: Name of the dataset.
        root: Folder to fill; files in it are used.
        console: Console for messages and progress.
        offline: Use no network; list the missing files instead.
        source: Folder of ImageNet-1k, for ImageNet-100; the root if None.
        classes: Variants to build, for ImageNet-100.
        patience: Timeouts and retries.

    Returns:
        The variants in the root.

    Raises:
        ValueError: If the dataset is unknown, or a file is not the published one.
        OSError: If something is missing, cannot be fetched, or does not fit on the disk.
    """
    if dataset not in NAMES:
        raise ValueError(f"The dataset {dataset!r} is unknown. {suggestion(dataset, NAMES)}")
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root):
        variants = _known(root, dataset, classes)
        if variants is None:
            with _bars(console) as begin:
                if dataset == "imagenet100":
                    variants = _build_imagenet100(root, source or root, classes, console, begin)
                else:
                    variants = _fill(RECIPES[dataset], root, console, offline, patience, begin)
    for variant in variants:
        console.print(f"{dataset}, {variant.line()}", markup=False)
    return variants


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    lock = FileLock(root / _LOCK, timeout=0)
    try:
        with lock:
            yield
    except Timeout as error:
        raise OSError(f"Another process is preparing {root}: wait until it ends, and run again.") from error


def _known(root: Path, dataset: str, classes: Sequence[Classes]) -> list[Variant] | None:
    """Return the variants of the manifest if it is still valid and covers the requested classes."""
    found = manifest.read(root, dataset)
    if found is None or manifest.changed(root, found.images) is not None:
        return None
    listed = {variant.name for variant in found.variants}
    names = [name for name in imagenet100.VARIANTS if f"classes {name}" in listed]
    if dataset == "imagenet100" and not set(classes) <= set(names):
        return None
    recipe, images = RECIPES.get(dataset), {image.path: image for image in found.images}
    try:
        made = imagenet100_variants(root, images, names) if recipe is None else recipe.variants(root, images)
    except (FileNotFoundError, ValueError):  # a list or a pickle has changed
        return None
    return made if made == found.variants else None


def _fill(
    recipe: Recipe, root: Path, console: Console, offline: bool, patience: Patience, begin: imagenet.Progress
) -> list[Variant]:
    absent = [archive for archive in recipe.archives if not _is_unpacked(archive, root)]
    missing = [archive for archive in absent if not (root / archive.name).exists()]
    _announce(recipe, root, missing, absent, console, offline=offline)
    if offline and missing:
        raise FileNotFoundError(
            f"{len(missing)} files are missing, such as {missing[0].name}, and --offline fetches none: "
            f"put them into {root}, or remove --offline."
        )
    for archive in absent:
        path = root / archive.name
        if archive in missing:
            assert archive.size is not None
            advance = begin(f"fetch {archive.name}", archive.size)
            advance(received(archive, root))
            download(archive, root, patience, advance)
        else:
            require_whole(path, archive, begin(f"check {archive.name}", path.stat().st_size))
        if archive.unpacks:
            unpack(path, archive.unpacks, root, begin(f"unpack {archive.name}", path.stat().st_size))
    return _finish(recipe.name, root, recipe.images(root), recipe.variants, begin)


def _is_unpacked(archive: Archive, root: Path) -> bool:
    """Return whether the archive's folder exists; a list, which has none, is checked each time."""
    return bool(archive.unpacks) and (root / archive.unpacks).is_dir()


def _announce(
    recipe: Recipe,
    root: Path,
    missing: Sequence[Archive],
    absent: Sequence[Archive],
    console: Console,
    *,
    offline: bool,
) -> None:
    """List what will be fetched, with sizes, and raise if the disk has too little space."""
    sizes = {archive: archive.size or 0 for archive in absent}
    to_fetch = sum(sizes[archive] - received(archive, root) for archive in missing)
    to_unpack = sum(size for archive, size in sizes.items() if archive.unpacks)
    for archive in missing:
        have = received(archive, root)
        kept = f", {human(have)} of it received already" if have else ""
        verb = "missing" if offline else "fetch"
        console.print(f"{verb} {archive.name}, {human(sizes[archive])}{kept}: {archive.url}", markup=False)
    if absent:
        free = shutil.disk_usage(root).free
        console.print(
            f"{recipe.name}: {human(to_fetch)} to fetch into {root}, about {human(to_unpack)} to unpack; "
            f"{human(free)} are free",
            markup=False,
        )
        require_space(root, to_fetch + to_unpack, f"for {recipe.name}")


def _build_imagenet100(
    root: Path, source: Path, classes: Sequence[Classes], console: Console, begin: imagenet.Progress
) -> list[Variant]:
    try:
        imagenet.build(source, root, _wnids(classes), begin)
    except imagenet.Missing:
        console.print(imagenet.INSTRUCTIONS, markup=False)
        raise
    complete = imagenet100_complete(root)
    names = [name for name in imagenet100.VARIANTS if name in classes or name in complete]
    files = imagenet100_images(root, _wnids(names))
    return _finish(
        "imagenet100", root, files, lambda root, images: imagenet100_variants(root, images, names), begin
    )


def _wnids(classes: Sequence[Classes]) -> list[str]:
    return sorted({wnid for name in classes for wnid in imagenet100.wnids(name)})


def _finish(
    dataset: str,
    root: Path,
    files: Sequence[str],
    variants: Callable[[Path, Images], list[Variant]],
    begin: imagenet.Progress,
) -> list[Variant]:
    """Scan every image, and write the manifest."""
    shutil.rmtree(root / STAGING, ignore_errors=True)  # left by a process that was killed
    scanned = scan(root, files, advance=begin("scan images", len(files)))
    found = variants(root, {image.path: image for image in scanned})
    manifest.write(root, dataset, scanned, found)
    return found


@contextmanager
def _bars(console: Console) -> Iterator[imagenet.Progress]:
    """Yield a function that starts a progress bar; without a terminal, no bar is shown."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def begin(step: str, total: int) -> Advance:
            task = progress.add_task(step, total=total)
            return lambda done: progress.advance(task, done)

        yield begin
