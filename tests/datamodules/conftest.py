"""Small datasets in exactly the published layouts, with one tiny image for every file."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cl_bench.data.published import cifar100, domainnet, imagenet100, imagenet_r

CIFAR_TRAIN, CIFAR_TEST = 5, 2
"""Images of each class."""


def link_everywhere(root: Path, files: Iterable[str]) -> None:
    """Make every one of ``files`` below ``root`` a link to one tiny image."""
    image = root / "image.jpg"
    Image.new("RGB", (12, 10), (200, 100, 50)).save(image)
    folders: set[str] = set()
    for file in files:
        folder = os.path.dirname(file)
        if folder not in folders:
            (root / folder).mkdir(parents=True)
            folders.add(folder)
        os.link(image, root / file)
    image.unlink()


@pytest.fixture(scope="session")
def imagenet_r_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imagenet_r")
    link_everywhere(root, [f"imagenet-r/{file}" for file in imagenet_r.files()])
    return root


Checksums = dict[str, str]


@pytest.fixture(scope="module")
def module_patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="session")
def imagenet100_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classes of all variants, with 3 training images and 1 test image each, and some other files."""
    root = tmp_path_factory.mktemp("imagenet100")
    wnids = sorted({wnid for classes in imagenet100.VARIANTS for wnid in imagenet100.wnids(classes)})
    train = [f"train/{wnid}/{wnid}_{index}.JPEG" for wnid in wnids for index in range(3)]
    val = [f"val/{wnid}/ILSVRC2012_val_{index:08}.JPEG" for index, wnid in enumerate(wnids)]
    stray = [f"{split}/{wnid}/Thumbs.db" for split in ("train", "val") for wnid in wnids[:3]]
    link_everywhere(root, [*train, *val, *stray])
    return root


@pytest.fixture(scope="module")
def imagenet100_root(imagenet100_files: Path, module_patch: pytest.MonkeyPatch) -> Path:
    """The root of small classes, which count as complete in a test module."""
    module_patch.setitem(imagenet100.PER_CLASS, "train", range(3, 4))
    module_patch.setitem(imagenet100.PER_CLASS, "val", range(1, 2))
    return imagenet100_files


@pytest.fixture(scope="session")
def domainnet_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Checksums]:
    """An image of every class in every list, but two test images in real, none of class 327 in painting."""
    root = tmp_path_factory.mktemp("domainnet")
    files = []
    checksums = {}
    for domain in domainnet.DOMAINS:
        for split, numbers in (("train", (1,)), ("test", (2, 3) if domain == "real" else (2,))):
            lines = [
                f"{domain}/{name}/{domain}_{label + 1:03}_{number:06}.jpg {label}"
                for label, name in enumerate(domainnet.names())
                for number in numbers
                if (domain, label) != ("painting", 327)
            ]
            files += [line.partition(" ")[0] for line in lines]
            content = "".join(f"{line}\n" for line in lines).encode()
            (root / f"{domain}_{split}.txt").write_bytes(content)
            md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
            checksums[f"{domain}_{split}.txt"] = md5
    link_everywhere(root, files)
    return root, checksums


@pytest.fixture(scope="module")
def domainnet_root(domainnet_files: tuple[Path, Checksums], module_patch: pytest.MonkeyPatch) -> Path:
    """The root of small files, whose checksums replace the published ones in a test module."""
    root, checksums = domainnet_files
    for name, md5 in checksums.items():
        module_patch.setitem(domainnet.LIST_MD5, name, md5)
    return root


@pytest.fixture(scope="session")
def cifar100_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Checksums]:
    """5 training and 2 test images of each class, in a shuffled order, as Python 2 pickled them."""
    root = tmp_path_factory.mktemp("cifar100")
    folder = root / cifar100.FOLDER
    folder.mkdir()
    generator = np.random.RandomState(0)
    contents: dict[str, dict[str, object]] = {
        "meta": {"fine_label_names": [f"class {label}" for label in range(100)], "coarse_label_names": []}
    }
    for split, number in (("train", CIFAR_TRAIN), ("test", CIFAR_TEST)):
        labels = generator.permutation(np.repeat(np.arange(100), number)).tolist()
        pixels = generator.randint(256, size=(len(labels), 3072), dtype=np.uint8)
        names = [f"{index}.png" for index in range(len(labels))]
        contents[split] = {"data": pixels, "fine_labels": labels, "coarse_labels": labels, "filenames": names}
    checksums = {}
    for name, content in contents.items():
        pickled = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(pickled)
        checksums[name] = hashlib.md5(pickled, usedforsecurity=False).hexdigest()
    return root, checksums


@pytest.fixture(scope="module")
def cifar100_root(cifar100_files: tuple[Path, Checksums], module_patch: pytest.MonkeyPatch) -> Path:
    """The root of small batches, whose checksums replace the published ones in a test module."""
    root, checksums = cifar100_files
    for name, md5 in checksums.items():
        module_patch.setitem(cifar100.MD5, name, md5)
    return root
