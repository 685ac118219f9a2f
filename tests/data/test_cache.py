from __future__ import annotations

import re
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp

from cl_bench.data.cache import CachedSource, CacheKind
from cl_bench.data.sources import FileSource
from cl_bench.data.views import CentreView, PresetName, RandomView, pixels_of, preset

SHAPES = [(40, 60), (60, 40), (33, 33), (50, 130)]
VIEW = CentreView(28, 32)


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    """Noisy pictures of several shapes."""
    (tmp_path / "images").mkdir()
    generator = np.random.RandomState(0)
    for index in range(12):
        height, width = SHAPES[index % len(SHAPES)]
        coarse = Image.fromarray(generator.randint(256, size=(height // 8, width // 8, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(tmp_path / "images" / f"{index:02}.png")
    return FileSource(tmp_path / "images", [f"{index:02}.png" for index in range(12)], list(range(12)))


@pytest.mark.parametrize("name", ["inflora", "pilot", "clip"])
def test_test_views_of_cached_pixels_are_those_of_the_files(
    source: FileSource, tmp_path: Path, name: PresetName
) -> None:
    view = preset(name, 28).test
    cached = CachedSource(source, "pixels", view, tmp_path / "cache")
    assert len(cached) == len(source)
    for index in range(len(source)):
        (image, label), (kept, kept_label) = source[index], cached[index]
        assert torch.equal(view(kept), view(image))
        assert label == kept_label


def test_test_views_of_cached_jpegs_are_nearly_those_of_the_files(source: FileSource, tmp_path: Path) -> None:
    cached = CachedSource(source, "jpeg", VIEW, tmp_path / "cache")
    differences = [(VIEW(cached[index][0]) - VIEW(source[index][0])).abs().mean() for index in range(12)]
    assert 0 < max(differences) < 2 / 255


@pytest.mark.parametrize("kind", ["pixels", "jpeg"])
def test_cached_images_have_the_requested_short_side(
    source: FileSource, tmp_path: Path, kind: CacheKind
) -> None:
    cached = CachedSource(source, kind, VIEW, tmp_path / "cache")
    for index in range(12):
        kept = cached[index][0]
        assert pixels_of(kept).shape == (3, kept.height, kept.width)
        assert min(kept.height, kept.width) == 32


def test_a_cache_has_the_fingerprint_of_its_files(source: FileSource, tmp_path: Path) -> None:
    assert CachedSource(source, "pixels", VIEW, tmp_path / "cache").fingerprint == source.fingerprint


def test_a_cache_is_built_and_announced_once(
    source: FileSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CachedSource(source, "pixels", VIEW, tmp_path / "cache")
    assert re.fullmatch(
        r"Building a cache of 12 decoded images, 0.00 GB, in .*cache\n", capsys.readouterr().err
    )
    (file,) = (tmp_path / "cache").rglob("images.bin")
    before = file.stat().st_mtime_ns
    CachedSource(source, "pixels", VIEW, tmp_path / "cache")
    assert capsys.readouterr().err == ""
    assert file.stat().st_mtime_ns == before


def test_another_resizing_or_kind_has_a_cache_of_its_own(source: FileSource, tmp_path: Path) -> None:
    for kind, view in (("pixels", VIEW), ("jpeg", VIEW), ("pixels", CentreView(28, 32, "bicubic"))):
        CachedSource(source, kind, view, tmp_path / "cache")  # type: ignore[arg-type]
    assert len(list((tmp_path / "cache").rglob("images.bin"))) == 3


def test_files_in_another_order_have_a_cache_of_their_own(source: FileSource, tmp_path: Path) -> None:
    CachedSource(source, "pixels", VIEW, tmp_path / "cache")
    reverse = FileSource(source.root, source.files[::-1], source.targets[::-1])
    cached = CachedSource(reverse, "pixels", VIEW, tmp_path / "cache")
    for index in range(len(reverse)):
        assert torch.equal(VIEW(cached[index][0]), VIEW(reverse[index][0]))


def test_a_replaced_file_is_decoded_again(source: FileSource, tmp_path: Path) -> None:
    CachedSource(source, "pixels", VIEW, tmp_path / "cache")
    Image.new("RGB", (60, 40), (10, 20, 30)).save(source.root / source.files[0])
    cached = CachedSource(source, "pixels", VIEW, tmp_path / "cache")
    assert torch.equal(VIEW(cached[0][0]), VIEW(source[0][0]))


def test_files_of_equal_names_in_two_roots_share_no_cache(source: FileSource, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for file in source.files:
        Image.new("RGB", (60, 40), (10, 20, 30)).save(tmp_path / "other" / file)
    CachedSource(source, "pixels", VIEW, tmp_path / "cache")
    other = FileSource(tmp_path / "other", source.files, source.targets)
    cached = CachedSource(other, "pixels", VIEW, tmp_path / "cache")
    assert torch.equal(VIEW(cached[5][0]), VIEW(other[5][0]))


def test_another_quality_of_jpeg_has_a_cache_of_its_own(
    source: FileSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CachedSource(source, "jpeg", VIEW, tmp_path / "cache")
    monkeypatch.setattr("cl_bench.data.cache.JPEG_QUALITY", 30)
    CachedSource(source, "jpeg", VIEW, tmp_path / "cache")
    assert len(list((tmp_path / "cache").rglob("images.bin"))) == 2


def test_what_a_killed_process_left_is_rebuilt(source: FileSource, tmp_path: Path) -> None:
    CachedSource(source, "pixels", VIEW, tmp_path / "cache")
    (place,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    whole = (place / "images.bin").read_bytes()
    place.rename(place.with_name(f".{place.name}.building"))
    (place.with_name(f".{place.name}.building") / "images.bin").write_bytes(b"half")
    CachedSource(source, "pixels", VIEW, tmp_path / "cache")
    assert (place / "images.bin").read_bytes() == whole
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [place]


@pytest.mark.parametrize("kind", ["pixels", "jpeg"])
def test_a_cache_that_does_not_fit_is_refused_and_leaves_nothing(
    source: FileSource, tmp_path: Path, kind: CacheKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(9000, 8000, 1000))
    with pytest.raises(
        OSError, match=r"The cache of 12 decoded images takes .* free in .*: set --cache to jpeg"
    ):
        CachedSource(source, kind, VIEW, tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_a_folder_that_cannot_be_created_is_an_error_with_a_remedy(source: FileSource) -> None:
    with pytest.raises(OSError, match=r"cache cannot be created \(.*\): choose another with --cache_dir"):
        CachedSource(source, "pixels", VIEW, source.root / "00.png" / "cache")


def test_an_unreadable_image_is_named_and_leaves_nothing(source: FileSource, tmp_path: Path) -> None:
    path = source.root / "03.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"The image .*03.png cannot be read"):
        CachedSource(source, "pixels", VIEW, tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_crops_of_cached_images_are_distributed_as_those_of_the_files() -> None:
    view = RandomView(224, (0.08, 1.0))
    torch.manual_seed(0)
    found = []
    for height, width in ((375, 500), (256, 341)):
        boxes = [view.box(height, width) for _ in range(1500)]
        found.append(
            [
                [box.height * box.width / (height * width) for box in boxes],
                [(box.width / box.height) for box in boxes],
                [box.top / height for box in boxes],
                [box.left / width for box in boxes],
                [float(box.mirrored) for box in boxes],
            ]
        )
    for full_size, kept in zip(*found, strict=True):
        assert ks_2samp(full_size, kept).pvalue > 0.01
