from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cl_bench.data.images import FileSource, PixelSource, require_files


def test_a_file_is_decoded_when_it_is_asked_for(tmp_path: Path) -> None:
    source = FileSource(tmp_path, ["a/1.png"], [3])
    (tmp_path / "a").mkdir()
    Image.new("L", (5, 4), 200).save(tmp_path / "a" / "1.png")
    image, label = source[0]
    assert (image.mode, image.size, image.getpixel((0, 0)), label) == ("RGB", (5, 4), (200, 200, 200), 3)


def test_pixels_in_memory_are_pillow_images() -> None:
    pixels = np.random.RandomState(0).randint(256, size=(2, 4, 5, 3), dtype=np.uint8)
    source = PixelSource(pixels, [1, 0])
    image, label = source[1]
    assert label == 0
    np.testing.assert_array_equal(np.asarray(image), pixels[1])


def test_a_fingerprint_tells_pixels_labels_and_shapes_apart() -> None:
    pixels = np.zeros((2, 4, 6, 3), dtype=np.uint8)
    other = pixels.copy()
    other[1, 3, 5, 2] = 1
    sources = [
        PixelSource(pixels, [0, 1]),
        PixelSource(other, [0, 1]),
        PixelSource(pixels, [1, 0]),
        PixelSource(pixels.reshape(2, 6, 4, 3), [0, 1]),
    ]
    assert len({source.fingerprint for source in sources}) == 4


def test_missing_files_are_counted_and_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").touch()
    require_files(tmp_path, ["a/1.jpg"], "prepare again.")
    with pytest.raises(
        FileNotFoundError, match=r"2 of 3 images are missing below .*, such as a/2.jpg: prepare"
    ):
        require_files(tmp_path, ["a/1.jpg", "b/1.jpg", "a/2.jpg"], "prepare again.")
