from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from rich.console import Console

from cl_bench.__main__ import main
from cl_bench.data import manifest
from cl_bench.data.manifest import fingerprint
from cl_bench.data.published import cifar100, domainnet, imagenet100, imagenet_r
from cl_bench.prepare.archives import Archive
from cl_bench.prepare.command import prepare
from cl_bench.prepare.download import Patience
from cl_bench.prepare.recipes import RECIPES
from cl_bench.prepare.unpacking import STAGING
from datamodules.cifar100 import Cifar100
from datamodules.domainnet import DomainNet
from datamodules.imagenet100 import ImageNet100

if TYPE_CHECKING:
    from tests.prepare.conftest import Publish, Server

LABELS = range(345)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def publish_recipe(name: str, archives: list[Archive], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, name, replace(RECIPES[name], archives=tuple(archives)))


@pytest.fixture
def small_domainnet(
    publish: Publish, jpeg: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> list[Archive]:
    """Six zips and twelve lists in the official numbering, with an image of every class in each list."""
    archives = []
    for domain in domainnet.DOMAINS:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as opened:
            for split, number in (("train", 1), ("test", 2)):
                lines = [
                    f"{domain}/{name}/{domain}_{label + 1:03}_{number:06}.jpg {label}"
                    for label, name in enumerate(domainnet.names())
                ]
                for line in lines:
                    opened.writestr(line.partition(" ")[0], jpeg(2 * int(line.partition(" ")[2]) + number))
                listed = publish(f"{domain}_{split}.txt", "".join(f"{line}\n" for line in lines).encode())
                archives.append(listed)
                monkeypatch.setitem(domainnet.LIST_MD5, listed.name, listed.md5)
        archives.append(publish(f"{domain}.zip", buffer.getvalue(), unpacks=domain))
    publish_recipe("domainnet", archives, monkeypatch)
    return archives


@pytest.fixture
def small_cifar(publish: Publish, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """The three pickles, with one training and one test image of each class."""
    labels = list(range(100))
    pixels = np.random.RandomState(0).randint(256, size=(100, 3072), dtype=np.uint8)
    contents: dict[str, Any] = {"meta": {"fine_label_names": [f"class {label}" for label in labels]}}
    contents |= {split: {"data": pixels, "fine_labels": labels} for split in ("train", "test")}
    files = {}
    for name, content in contents.items():
        files[f"cifar-100-python/{name}"] = pickled = pickle.dumps(content, protocol=2)
        monkeypatch.setitem(cifar100.MD5, name, hashlib.md5(pickled, usedforsecurity=False).hexdigest())
    archive = publish("cifar-100-python.tar.gz", tarred(files, "w:gz"), unpacks="cifar-100-python")
    publish_recipe("cifar100", [archive], monkeypatch)
    return archive


@pytest.fixture
def small_imagenet_r(
    publish: Publish, jpeg: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> Archive:
    """One tar of folders, with ten images of three classes instead of thirty thousand."""
    baked = {
        "images": {"n01": "art 4", "n02": "misc 2 toy 1", "n03": "art 3"},
        "published_label_order": [2, 0, 1],
    }
    monkeypatch.setattr(imagenet_r, "_baked", lambda: baked | {"coda_test": "wAA="})
    for split in imagenet_r.SPLITS:
        for part, listed in zip(("train", "test"), unchecked(split, monkeypatch), strict=True):
            monkeypatch.setitem(imagenet_r.SHA256, (split, part), fingerprint(listed))
    files = {f"imagenet-r/{file}": jpeg(i) for i, file in enumerate(imagenet_r.files())}
    archive = publish(
        "imagenet-r.tar", tarred(files | {"imagenet-r/README.txt": b"read me"}), unpacks="imagenet-r"
    )
    publish_recipe("imagenet_r", [archive], monkeypatch)
    return archive


def unchecked(split: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    with monkeypatch.context() as patch:
        patch.setattr(imagenet_r, "require_fingerprint", lambda *_: None)
        return imagenet_r.split(split)


def tarred(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def listing(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_imagenet_r_is_fetched_unpacked_scanned_and_listed(
    tmp_path: Path, small_imagenet_r: Archive, console: Console, patience: Patience
) -> None:
    prepare("imagenet_r", tmp_path, console, patience=patience)
    said = text(console)
    assert said.startswith("fetch imagenet-r.tar, ")
    assert small_imagenet_r.url in said
    lines = said.splitlines()[-3:]
    assert lines[0].startswith("imagenet_r, split coda: 8 + 2 images, 3 classes, sha256 ")
    assert [line.split(":")[0].split(" ")[-1] for line in lines] == ["coda", "inflora", "sorted80"]
    assert {"imagenet-r/n02/toy_0.jpg", manifest.FILE_NAME, manifest.LIST_NAME} <= listing(tmp_path)


def test_a_second_call_fetches_and_changes_nothing(
    tmp_path: Path, small_imagenet_r: Archive, server: Server, console: Console, patience: Patience
) -> None:
    first = prepare("imagenet_r", tmp_path, console, patience=patience)
    requests = len(server.ranges)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".preparing"}
    assert prepare("imagenet_r", tmp_path, console, patience=patience) == first
    assert len(server.ranges) == requests
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_removed_files_are_fetched_again(
    tmp_path: Path, small_cifar: Archive, small_domainnet: list[Archive], console: Console, patience: Patience
) -> None:
    for dataset, removed in (("cifar100", small_cifar.unpacks), ("domainnet", "sketch_test.txt")):
        root = tmp_path / dataset
        first = prepare(dataset, root, console, patience=patience)
        (root / small_cifar.name).unlink(missing_ok=True)
        path = root / removed
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert prepare(dataset, root, console, patience=patience) == first
        assert path.exists()


def test_a_run_reads_what_was_prepared(
    tmp_path: Path, small_cifar: Archive, small_domainnet: list[Archive], console: Console, patience: Patience
) -> None:
    (variant,) = prepare("cifar100", tmp_path / "cifar", console, patience=patience)
    data = Cifar100(root=str(tmp_path / "cifar"), num_experiences=10, image_size=32)
    data.setup()
    protocol = data.protocol()
    assert (variant.train_sha256, variant.test_sha256) == (protocol["train_images"], protocol["test_images"])
    assert (variant.train_images, variant.test_images, variant.classes) == (100, 100, 100)
    variants = prepare("domainnet", tmp_path / "domainnet", console, patience=patience)
    for found, name in zip(variants, domainnet.VARIANTS, strict=True):
        net = DomainNet(root=str(tmp_path / "domainnet"), num_experiences=5, image_size=32, variant=name)
        net.setup()
        assert found.test_sha256 == net.protocol()["test_images"]
        assert found.test_images == sum(net.test_images)
        assert found.images_sha256 == net.images_sha256 is not None
    assert len({found.images_sha256 for found in variants}) == len(domainnet.VARIANTS)


def test_the_hash_of_the_files_does_not_depend_on_other_variants(
    tmp_path: Path, imagenet_folders: Path, console: Console
) -> None:
    (single,) = prepare("imagenet100", tmp_path / "root", console, source=imagenet_folders, classes=["cmc"])
    both = prepare("imagenet100", imagenet_folders, console, classes=["first100", "cmc"])
    assert single == both[1]
    data = ImageNet100(root=str(tmp_path / "root"), classes="cmc", num_experiences=10)
    assert data.images_sha256 == single.images_sha256
    assert ImageNet100(root=str(tmp_path / "root"), num_experiences=10).images_sha256 is None


def test_offline_uses_existing_files_and_names_missing_ones(
    tmp_path: Path, small_imagenet_r: Archive, server: Server, console: Console
) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"1 files are missing, such as imagenet-r.tar, and --offline"
    ):
        prepare("imagenet_r", tmp_path, console, offline=True)
    assert "missing imagenet-r.tar, " in text(console)
    assert small_imagenet_r.url in text(console)
    (tmp_path / "imagenet-r.tar").write_bytes(server.files["imagenet-r.tar"])
    assert len(prepare("imagenet_r", tmp_path, console, offline=True)) == 3
    assert server.ranges == []


def test_an_unpacked_folder_needs_no_archive(
    tmp_path: Path, small_imagenet_r: Archive, server: Server, console: Console
) -> None:
    with tarfile.open(fileobj=io.BytesIO(server.files["imagenet-r.tar"])) as archive:
        archive.extractall(tmp_path, filter="data")
    assert len(prepare("imagenet_r", tmp_path, console)) == 3
    assert server.ranges == []


def test_an_incomplete_folder_is_refused(
    tmp_path: Path, small_imagenet_r: Archive, console: Console, patience: Patience
) -> None:
    prepare("imagenet_r", tmp_path, console, patience=patience)
    (tmp_path / "imagenet-r" / "n02" / "toy_0.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of 10 images are missing .*such as imagenet-r/n02/toy_0.jpg"
    ):
        prepare("imagenet_r", tmp_path, console, patience=patience)


def test_a_file_with_another_checksum_is_refused_and_kept(
    tmp_path: Path, small_imagenet_r: Archive, server: Server, console: Console
) -> None:
    content = bytearray(server.files["imagenet-r.tar"])
    content[700] ^= 1
    (tmp_path / "imagenet-r.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"imagenet-r.tar has the md5 \w+, not the published \w+: remove it"):
        prepare("imagenet_r", tmp_path, console)
    assert listing(tmp_path) == {"imagenet-r.tar", ".preparing"}


def test_a_broken_image_leaves_no_manifest(
    tmp_path: Path,
    small_imagenet_r: Archive,
    publish: Publish,
    server: Server,
    console: Console,
    patience: Patience,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {f"imagenet-r/{file}": b"a text" for file in imagenet_r.files()}
    publish_recipe(
        "imagenet_r", [publish("imagenet-r.tar", tarred(files), unpacks="imagenet-r")], monkeypatch
    )
    with pytest.raises(ValueError, match=r"10 of 10 images .* such as imagenet-r/n01/art_0.jpg \(not an"):
        prepare("imagenet_r", tmp_path, console, patience=patience)
    assert manifest.FILE_NAME not in listing(tmp_path)


def test_a_full_disk_is_an_error_before_anything_is_fetched(
    tmp_path: Path, server: Server, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 10**9})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"has 1.0 GB free and 4.4 GB are needed for imagenet_r: free some"):
        prepare("imagenet_r", tmp_path, console)
    assert "imagenet_r: 2.2 GB to fetch into" in text(console)


def test_two_processes_never_fill_one_root(tmp_path: Path, console: Console) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / ".preparing"), pytest.raises(OSError, match="Another process is preparing"):
        prepare("imagenet_r", tmp_path, console)


def test_the_verb_prepares_a_dataset_and_suggests_a_name(
    tmp_path: Path, small_cifar: Archive, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "cifar100", "--root", str(tmp_path)]) == 0
    assert "cifar100, cifar100: 100 + 100 images, 100 classes" in capsys.readouterr().out
    assert main(["prepare", "cifar10", "--root", str(tmp_path)]) == 2
    assert "Did you mean cifar100?" in capsys.readouterr().err


def test_the_verb_explains_how_to_get_imagenet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "imagenet100", "--root", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "Register at https://image-net.org" in printed.out
    assert "name the folder of ImageNet-1k with --source" in printed.err


@pytest.fixture
def imagenet_folders(tmp_path: Path, small_classes: None, jpeg: Callable[[int], bytes]) -> Path:
    """An image of every class of two variants."""
    for split in ("train", "val"):
        for place, wnid in enumerate(sorted({*imagenet100.wnids("cmc"), *imagenet100.wnids("first100")})):
            folder = tmp_path / "whole" / split / wnid
            folder.mkdir(parents=True)
            (folder / f"{wnid}_1.JPEG").write_bytes(jpeg(place))
    return tmp_path / "whole"


def test_imagenet100_is_built_from_folders(
    tmp_path: Path, imagenet_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", "imagenet100", "--root", str(tmp_path / "root"), "--source", str(imagenet_folders)]
    assert main([*words, "--classes", "cmc"]) == 0
    assert "imagenet100, classes cmc: 100 + 100 images, 100 classes" in capsys.readouterr().out
    assert main(words) == 2
    assert main([*words, "--classes", "cmc"]) == 0


def test_every_variant_in_the_manifest_was_scanned(
    tmp_path: Path, imagenet_folders: Path, console: Console
) -> None:
    for classes in ("first100", "cmc"):
        prepare("imagenet100", tmp_path / "root", console, source=imagenet_folders, classes=[classes])
    found = manifest.read(tmp_path / "root", "imagenet100")
    assert found is not None
    assert [variant.name for variant in found.variants] == ["classes first100", "classes cmc"]
    assert len(found.images) == 2 * (100 + 100 - 8)


def test_a_broken_image_of_an_existing_variant_is_found(
    tmp_path: Path, imagenet_folders: Path, console: Console
) -> None:
    root = tmp_path / "root"
    prepare("imagenet100", root, console, source=imagenet_folders, classes=["first100"])
    next((root / "train").rglob("*.JPEG")).write_bytes(b"a text")
    with pytest.raises(ValueError, match=r"1 of 384 images below .* cannot be decoded"):
        prepare("imagenet100", root, console, source=imagenet_folders, classes=["cmc"])


def test_an_additional_image_is_detected(tmp_path: Path, imagenet_folders: Path, console: Console) -> None:
    prepare("imagenet100", imagenet_folders, console, classes=["cmc"])
    image = next((imagenet_folders / "val" / imagenet100.wnids("cmc")[0]).iterdir())
    shutil.copyfile(image, image.with_name("another.JPEG"))
    assert prepare("imagenet100", imagenet_folders, console, classes=["cmc"])[-1].test_images == 101


def files_of_manifest(root: Path) -> dict[str, bytes]:
    """Return the files of the manifest of a root that holds nothing unfinished."""
    assert not (root / STAGING).exists()
    assert not list(root.glob("*.part"))
    return {name: (root / name).read_bytes() for name in (manifest.FILE_NAME, manifest.LIST_NAME)}


def test_an_interrupted_preparation_is_completed_to_the_same_manifest(
    tmp_path: Path, small_domainnet: list[Archive], console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "interrupted"
    for moves, number in (("replace", 7), ("rename", 3)):  # a fetched archive, and an unpacked folder
        left = iter(range(number))

        def move(path: Path, target: Path, moves: str = moves, left: Iterator[int] = left) -> Path:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return Path(getattr(os, moves)(path, target) or target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, moves, move)
            prepare("domainnet", root, console)
        assert not (root / manifest.FILE_NAME).exists()
    for folder in (root, tmp_path / "whole"):
        prepare("domainnet", folder, console)
    assert files_of_manifest(root) == files_of_manifest(tmp_path / "whole")


# A process to be killed. Its recipe is given as JSON, because the real archives are too large.
PROCESS = """
import json, sys
from dataclasses import replace
from pathlib import Path
from rich.console import Console
from cl_bench.prepare.archives import Archive
from cl_bench.prepare.command import prepare
from cl_bench.prepare.recipes import RECIPES
from cl_bench.data.published import domainnet

archives = tuple(Archive(**archive) for archive in json.loads(Path(sys.argv[1]).read_text()))
domainnet.LIST_MD5.update({archive.name: archive.md5 for archive in archives if not archive.unpacks})
RECIPES["domainnet"] = replace(RECIPES["domainnet"], archives=archives)
prepare("domainnet", Path(sys.argv[2]), Console())
"""


@pytest.fixture
def process(tmp_path: Path, small_domainnet: list[Archive]) -> Callable[[Path], list[str]]:
    """The command that prepares a root in another process."""
    described = [vars(archive) for archive in small_domainnet]
    (tmp_path / "archives.json").write_text(json.dumps(described))
    (tmp_path / "process.py").write_text(PROCESS)
    script, archives = str(tmp_path / "process.py"), str(tmp_path / "archives.json")
    return lambda root: [sys.executable, script, archives, str(root)]


def killed(command: list[str], seconds: float, generator: random.Random) -> bool:
    """Kill the process at a random moment within ``seconds``; return whether it was still running."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(generator.uniform(0, seconds))
    running = child.poll() is None
    child.kill()
    child.wait()
    return running


def finished(command: list[str], root: Path) -> dict[str, bytes]:
    """Let the process finish; return the files of its manifest."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return files_of_manifest(root)


@pytest.mark.soak
def test_twenty_kills_leave_the_same_manifest(tmp_path: Path, process: Callable[[Path], list[str]]) -> None:
    began = time.perf_counter()
    whole = finished(process(tmp_path / "whole"), tmp_path / "whole")
    seconds, generator = time.perf_counter() - began, random.Random(0)
    for number in range(20):
        root = tmp_path / f"killed {number}"
        while not killed(process(root), seconds, generator):  # the machine was slower during the measurement
            shutil.rmtree(root)
            seconds *= 0.8
        assert finished(process(root), root) == whole


@pytest.mark.soak
def test_kills_in_a_row_leave_the_same_manifest(tmp_path: Path, process: Callable[[Path], list[str]]) -> None:
    began = time.perf_counter()
    whole = finished(process(tmp_path / "whole"), tmp_path / "whole")
    seconds, generator = time.perf_counter() - began, random.Random(0)
    root = tmp_path / "killed"
    for _ in range(20):
        killed(process(root), seconds, generator)
    assert finished(process(root), root) == whole
