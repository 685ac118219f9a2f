from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from cl_bench.data.published import imagenet100
from cl_bench.prepare import imagenet
from cl_bench.prepare.imagenet import Missing, build

WNIDS = ["n01440764", "n01443537", "n01484850"]
TRUTH = [2, 3, 1, 2]
"""Class numbers of the validation images; the numbering is not that of the sorted WordNet ids."""
WNID_OF = {1: WNIDS[2], 2: WNIDS[0], 3: WNIDS[1]}


def no_progress(what: str, total: int) -> Callable[[int], None]:
    return lambda done: None


def tarred(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def devkit() -> bytes:
    """Three leaves and one synset above them, as MATLAB stores them."""
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(number, wnid, "a word", "a gloss", 0) for number, wnid in WNID_OF.items()]
    synsets = np.array([*rows, (4, "n00001740", "entity", "all", 3)], dtype=kinds)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets.reshape(-1, 1)})
    return tarred(
        {
            "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "\n".join(
                map(str, TRUTH)
            ).encode(),
        },
        "w:gz",
    )


@pytest.fixture
def source(
    tmp_path: Path, small_classes: None, jpeg: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The three original files, with 2 training images of each class and 4 for validation."""
    folder = tmp_path / "originals"
    folder.mkdir()
    inner = {
        f"{wnid}.tar": tarred({f"{wnid}_{i}.JPEG": jpeg(10 * place + i) for i in range(2)})
        for place, wnid in enumerate(WNIDS)
    }
    val = {f"ILSVRC2012_val_{number:08}.JPEG": jpeg(100 + number) for number in range(1, 5)}
    for name, content in (
        ("IMAGENET_TRAIN", tarred(inner)),
        ("IMAGENET_VAL", tarred(val)),
        ("IMAGENET_DEVKIT", devkit()),
    ):
        archive = getattr(imagenet, name)
        (folder / archive.name).write_bytes(content)
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        monkeypatch.setattr(imagenet, name, replace(archive, size=len(content), md5=md5))
    return folder


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.JPEG"))


EXPECTED = [
    *(f"train/{wnid}/{wnid}_{i}.JPEG" for wnid in WNIDS[:2] for i in range(2)),
    # Images 1 and 4 belong to class 2, image 2 to class 3, and image 3 to a class that is not requested.
    f"val/{WNIDS[0]}/ILSVRC2012_val_00000001.JPEG",
    f"val/{WNIDS[0]}/ILSVRC2012_val_00000004.JPEG",
    f"val/{WNIDS[1]}/ILSVRC2012_val_00000002.JPEG",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def test_the_original_tars_give_the_requested_classes(source: Path, root: Path) -> None:
    build(source, root, WNIDS[:2], no_progress)
    assert files(root) == EXPECTED
    assert sorted(path.name for path in root.iterdir()) == ["train", "val"]


def test_folders_work_as_well_and_their_links_are_resolved(source: Path, root: Path, tmp_path: Path) -> None:
    build(source, root, WNIDS, no_progress)
    image = root / EXPECTED[0]
    image.rename(tmp_path / "elsewhere.JPEG")
    image.symlink_to(tmp_path / "elsewhere.JPEG")
    (tmp_path / "second").mkdir()
    build(root, tmp_path / "second", WNIDS[:2], no_progress)
    assert files(tmp_path / "second") == EXPECTED
    assert not (tmp_path / "second" / EXPECTED[0]).is_symlink()
    assert (tmp_path / "second" / EXPECTED[0]).read_bytes() == (tmp_path / "elsewhere.JPEG").read_bytes()


def test_an_incomplete_folder_is_refused_before_anything_is_copied(
    source: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(source, root, WNIDS, no_progress)
    monkeypatch.setitem(imagenet100.PER_CLASS, "train", range(2, 3))
    (root / EXPECTED[3]).unlink()
    (tmp_path / "second").mkdir()
    with pytest.raises(ValueError, match=f"train/{WNIDS[1]} holds 1 images"):
        build(root, tmp_path / "second", WNIDS, no_progress)
    assert files(tmp_path / "second") == []


def test_other_files_are_not_copied(source: Path, root: Path, tmp_path: Path) -> None:
    build(source, root, WNIDS[:2], no_progress)
    (root / EXPECTED[0]).with_name("Thumbs.db").touch()
    (root / EXPECTED[0]).with_name("more").mkdir()
    (tmp_path / "second").mkdir()
    build(root, tmp_path / "second", WNIDS[:2], no_progress)
    assert sorted(path.name for path in (tmp_path / "second" / EXPECTED[0]).parent.iterdir()) == [
        Path(file).name for file in EXPECTED[:2]
    ]


def test_existing_classes_are_kept_and_missing_ones_added(source: Path, root: Path) -> None:
    build(source, root, WNIDS[:1], no_progress)
    for path in source.iterdir():
        path.rename(root / path.name)
    before = (root / EXPECTED[0]).stat().st_mtime_ns
    build(root, root, WNIDS[:2], no_progress)
    assert files(root) == EXPECTED
    assert (root / EXPECTED[0]).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("absent", "fault"),
    [
        (
            "IMAGENET_TRAIN",
            "holds neither ILSVRC2012_img_train.tar nor a folder train/n01440764, and 2 classes",
        ),
        ("IMAGENET_VAL", "holds neither ILSVRC2012_img_val.tar nor a folder val/n01440764"),
        ("IMAGENET_DEVKIT", "ILSVRC2012_devkit_t12.tar.gz, .* is missing from"),
    ],
)
def test_a_missing_original_is_named(source: Path, root: Path, absent: str, fault: str) -> None:
    (source / getattr(imagenet, absent).name).unlink()
    with pytest.raises(Missing, match=fault):
        build(source, root, WNIDS[:2], no_progress)


@pytest.mark.parametrize("name", ["IMAGENET_TRAIN", "IMAGENET_VAL", "IMAGENET_DEVKIT"])
def test_another_file_than_the_original_is_refused(source: Path, root: Path, name: str) -> None:
    path = source / getattr(imagenet, name).name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="has the md5"):
        build(source, root, WNIDS[:2], no_progress)
    assert not list(root.glob(".unpacking"))


@pytest.mark.parametrize(("split", "present"), [("train", []), ("val", ["train"])])
def test_a_full_disk_is_an_error_before_a_class_is_unpacked(
    source: Path, root: Path, split: str, present: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in present:
        for wnid in WNIDS:
            (root / part / wnid).mkdir(parents=True)
    largest = max(path.stat().st_size for path in source.iterdir()) // 3  # enough for one class
    usage = type("usage", (), {"free": largest if split == "train" else 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=rf"are needed to unpack 3 classes of {split}: free some space"):
        build(source, root, WNIDS, no_progress)
    assert files(root) == []
    assert [path.name for path in (root / split).iterdir()] == []
