from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cl_bench.data.manifest import Scanned
from cl_bench.prepare.scanning import scan


def noise() -> bytes:
    """A picture whose file consists mostly of pixels."""
    buffer = io.BytesIO()
    pixels = np.random.RandomState(0).randint(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "jpeg")
    return buffer.getvalue()


def test_every_image_is_described(tmp_path: Path, jpeg: Callable[[int], bytes]) -> None:
    files = [f"{number}.jpg" for number in range(150)]
    for number, file in enumerate(files):
        (tmp_path / file).write_bytes(jpeg(number))
    done: list[int] = []
    found = scan(tmp_path, files, advance=done.append)
    assert [image.path for image in found] == files
    content = jpeg(7)
    assert found[7] == Scanned("7.jpg", len(content), hashlib.sha256(content).hexdigest(), 10, 12)
    assert sum(done) == 150
    assert scan(tmp_path, files, workers=1) == found


def test_a_text_and_a_truncated_image_are_named(tmp_path: Path, jpeg: Callable[[int], bytes]) -> None:
    contents = {"good.jpg": jpeg(1), "text.jpg": b"no picture at all", "cut.jpg": noise()[:-1000]}
    for file, content in contents.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(
        ValueError, match=r"2 of 3 images .* cannot be decoded, such as text.jpg \(not an image\): remove"
    ):
        scan(tmp_path, list(contents))
    with pytest.raises(ValueError, match=r"1 of 2 images .*, such as cut.jpg \(.*truncated"):
        scan(tmp_path, ["good.jpg", "cut.jpg"])


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.jpg"):
        scan(tmp_path, ["nowhere.jpg"])
