from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from cl_bench.data.cache import CachedSource
from cl_bench.data.decoding import decoded, in_rgb, require_readable
from cl_bench.data.sources import FileSource
from cl_bench.data.views import preset
from cl_bench.prepare.scanning import scan

GREY = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)
LEVELS = GREY.astype(np.uint16) * 257  # the same grey in 16 bits


def pixels(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    image = decoded(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.pgm", "grey.jp2"])
def test_grey_of_16_bits_gives_the_picture_of_8_bits(name: str, tmp_path: Path) -> None:
    Image.fromarray(LEVELS).save(tmp_path / name)
    Image.fromarray(GREY).save(tmp_path / "grey8.png")
    assert np.array_equal(pixels(tmp_path / name), pixels(tmp_path / "grey8.png"))


def test_grey_of_16_bits_with_the_high_byte_first_gives_the_same_picture(tmp_path: Path) -> None:
    Image.frombytes("I;16B", (20, 12), LEVELS.astype(">u2").tobytes()).save(tmp_path / "grey.tif")
    assert np.array_equal(pixels(tmp_path / "grey.tif")[:, :, 0], GREY)


def test_a_tiff_whose_zero_is_white_is_inverted_as_with_8_bits(tmp_path: Path) -> None:
    for bits, levels in ((8, 255 - GREY), (16, 65535 - LEVELS)):
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[262] = 0
        Image.fromarray(levels).save(tmp_path / f"{bits}.tif", tiffinfo=tags)
    content = (tmp_path / "16.tif").read_bytes()
    assert Image.open(io.BytesIO(content)).tag_v2[262] == 0  # type: ignore[attr-defined]
    assert np.array_equal(pixels(tmp_path / "16.tif")[:, :, 0], GREY)


def test_grey_is_rounded_to_the_nearest_of_256_levels() -> None:
    every = Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256))
    expected = np.floor(np.arange(65536) / 65535 * 255 + 0.5).reshape(256, 256)
    assert np.array_equal(np.asarray(in_rgb(every))[:, :, 1], expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_of_8_bits_becomes_rgb_without_its_transparency(mode: str) -> None:
    black_and_white = np.repeat(np.array([[0, 255]], dtype=np.uint8), 3, 0)
    image = Image.fromarray(black_and_white).convert("LA" if mode == "PA" else "RGB").convert(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if mode == "P":
            image.info["transparency"] = b"\0\xff"
        found = np.asarray(in_rgb(image))
    assert np.array_equal(found, np.repeat(black_and_white[:, :, None], 3, 2))


FLOATS = {
    "F": np.linspace(0, 1, 240, dtype=np.float32).reshape(12, 20),
    "I": np.arange(240, dtype=np.int32).reshape(12, 20),
}


@pytest.mark.parametrize("mode", FLOATS)
def test_numbers_without_a_known_range_are_refused_by_name(mode: str, tmp_path: Path) -> None:
    Image.fromarray(FLOATS[mode]).save(tmp_path / "x.tif")
    kind = "floating-point numbers" if mode == "F" else "whole numbers of 32 bits"
    with pytest.raises(ValueError, match=rf"The image {tmp_path}/x\.tif cannot be read \(it holds {kind}"):
        decoded(tmp_path / "x.tif")
    for check in (require_readable, scan):
        with pytest.raises(ValueError, match=rf"such as x\.tif \(it holds {kind}"):
            check(tmp_path, ["x.tif"])


def test_a_cache_holds_grey_of_16_bits_as_it_is_decoded(tmp_path: Path) -> None:
    Image.fromarray(LEVELS).resize((64, 64)).save(tmp_path / "x.png")
    view = preset("inflora", 64, whole=True).test
    source = CachedSource(FileSource(tmp_path, ["x.png"], [0]), "pixels", view, tmp_path / "cache")
    stored = np.asarray(source[0][0].array)  # type: ignore[union-attr]
    assert np.array_equal(stored, pixels(tmp_path / "x.png"))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "ppm", "tif", "jp2", "avif"])
def test_files_that_end_too_early_are_found_without_a_run(suffix: str, tmp_path: Path) -> None:
    noise = np.random.RandomState(0).randint(256, size=(120, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
    content = (tmp_path / f"whole.{suffix}").read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(content[: len(content) // 2])
    require_readable(tmp_path, [f"whole.{suffix}"])
    with pytest.raises(ValueError, match=rf"1 of 2 images .* cannot be read, such as cut\.{suffix} \("):
        require_readable(tmp_path, [f"whole.{suffix}", f"cut.{suffix}"])


def test_whole_jpegs_are_not_decoded_and_those_without_an_end_mark_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = Image.Image.load

    def recorded(image: Image.Image) -> Any:
        loaded.append(str(image.format))
        return load(image)

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", recorded)
    Image.fromarray(GREY).save(tmp_path / "x.jpg")
    require_readable(tmp_path, ["x.jpg"])
    assert loaded == []
    content = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "y.jpg").write_bytes(content + bytes(10))  # what some cameras write behind it
    (tmp_path / "z.jpg").write_bytes(content[:-2])
    require_readable(tmp_path, ["x.jpg", "y.jpg", "z.jpg"])
    assert loaded == ["JPEG"]
