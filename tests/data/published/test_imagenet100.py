from importlib.resources import files as package_files
from pathlib import Path

import numpy as np
import pytest

from cl_bench.data.published import imagenet100
from cl_bench.data.published.imagenet100 import VARIANTS, Classes, Split


@pytest.fixture(scope="module")
def imagenet_1k() -> list[str]:
    """The 1,000 WordNet ids, as timm ships them."""
    return sorted(package_files("timm").joinpath("data/_info/imagenet_synsets.txt").read_text().split())


@pytest.mark.parametrize("classes", VARIANTS)
def test_a_variant_is_a_hundred_classes_of_imagenet(classes: Classes, imagenet_1k: list[str]) -> None:
    ids = imagenet100.wnids(classes)
    assert len(set(ids)) == 100
    assert set(ids) <= set(imagenet_1k)


def test_first100_are_the_first_hundred(imagenet_1k: list[str]) -> None:
    assert imagenet100.wnids("first100") == imagenet_1k[:100]


def test_numpy1993_are_drawn_by_numpys_seed(imagenet_1k: list[str]) -> None:
    drawn = np.random.RandomState(1993).choice(imagenet_1k, 100, replace=False)
    assert imagenet100.wnids("numpy1993") == sorted(drawn)


def test_the_variants_share_few_classes() -> None:
    first, drawn, cmc = (set(imagenet100.wnids(classes)) for classes in VARIANTS)
    assert (len(first & drawn), len(first & cmc), len(drawn & cmc)) == (9, 8, 7)


def test_a_changed_list_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(imagenet100.SHA256, "cmc", "0" * 64)
    with pytest.raises(ValueError, match="ImageNet-100 cmc has the sha256"):
        imagenet100.wnids("cmc")


@pytest.mark.parametrize(
    ("split", "number", "published"), [("val", 49, "50"), ("val", 51, "50"), ("train", 9, "732 to 1,300")]
)
def test_an_incomplete_class_is_refused(tmp_path: Path, split: Split, number: int, published: str) -> None:
    folder = tmp_path / split / "n01440764"
    folder.mkdir(parents=True)
    for index in range(number):
        (folder / f"{index}.JPEG").touch()
    with pytest.raises(
        ValueError,
        match=rf"n01440764 holds {number} images \*.JPEG, and a class has {published}: remove it, then",
    ):
        imagenet100.images(tmp_path, split, "n01440764")


def test_the_images_of_a_class_are_its_jpegs_in_byte_order(tmp_path: Path) -> None:
    folder = tmp_path / "val" / "n01440764"
    folder.mkdir(parents=True)
    names = [f"{index:02}.JPEG" for index in range(50)]
    for name in [*names[::-1], "Thumbs.db", "a.txt"]:
        (folder / name).touch()
    assert imagenet100.images(tmp_path, "val", "n01440764") == [f"val/n01440764/{name}" for name in names]
