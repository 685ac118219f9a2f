from __future__ import annotations

import hashlib
from collections import Counter
from importlib.resources import files as package_files
from itertools import pairwise

import pytest
import torch
from torch.utils.data import Dataset, random_split

from cl_bench.data.published import imagenet_r
from cl_bench.data.published.imagenet_r import SPLITS, LabelOrder, Split

# sha256 of the published test list, sorted, one path a line.
CODA_TEST = "9e7f6243e605e2223739b158f26e442480eb940f9e24508bf6c02c939efdcc26"


def per_class(files: list[str]) -> Counter[str]:
    return Counter(file.partition("/")[0] for file in files)


def test_the_archive_holds_thirty_thousand_images_of_two_hundred_classes() -> None:
    files = imagenet_r.files()
    assert len(files) == len(set(files)) == 30_000
    assert all(one < other for one, other in pairwise(files))
    counts = per_class(files)
    assert len(counts) == 200
    assert (min(counts.values()), max(counts.values())) == (51, 430)
    styles = Counter(file.partition("/")[2].rpartition("_")[0] for file in files)
    assert (len(styles), styles["misc"], styles["sketch"], styles["sticker"]) == (15, 5673, 4634, 508)


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_divides_all_images(split: Split) -> None:
    train, test = imagenet_r.split(split)
    assert sorted(train + test) == imagenet_r.files()


def test_coda_is_the_published_list() -> None:
    train, test = imagenet_r.split("coda")
    assert (len(train), len(test)) == (24_000, 6_000)
    assert hashlib.sha256("\n".join(test).encode()).hexdigest() == CODA_TEST
    counts = [per_class(files).values() for files in (train, test)]
    assert [(min(values), max(values)) for values in counts] == [(38, 354), (5, 81)]


class Everything(Dataset[int]):
    def __len__(self) -> int:
        return 30_000


def test_inflora_is_what_torch_splits_after_seed_zero() -> None:
    state = torch.get_rng_state()
    torch.manual_seed(0)
    indices: list[list[int]] = [list(part.indices) for part in random_split(Everything(), [24_000, 6_000])]
    torch.set_rng_state(state)
    files = imagenet_r.files()
    expected = [sorted(files[index] for index in part) for part in indices]
    assert list(imagenet_r.split("inflora")) == expected


@pytest.mark.parametrize("seed", [0, 1, 1993])
def test_a_permutation_is_that_of_torch(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    assert imagenet_r.torch_permutation(1000, seed) == torch.randperm(1000, generator=generator).tolist()


def test_sorted80_trains_on_the_first_names_of_each_class() -> None:
    train, test = (per_class(files) for files in imagenet_r.split("sorted80"))
    for wnid, count in per_class(imagenet_r.files()).items():
        assert train[wnid] == int(0.8 * count + 1e-9)
    last_of_train, first_of_test = {}, {}
    for file in imagenet_r.split("sorted80")[0]:
        last_of_train[file.partition("/")[0]] = file
    for file in reversed(imagenet_r.split("sorted80")[1]):
        first_of_test[file.partition("/")[0]] = file
    assert all(last_of_train[wnid] < first_of_test[wnid] for wnid in test)


def test_a_changed_list_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(imagenet_r.SHA256, ("coda", "test"), "0" * 64)
    with pytest.raises(ValueError, match="ImageNet-R coda test has the sha256 9e7f6243e605e222…"):
        imagenet_r.split("coda")


def test_sorted_labels_are_those_of_timm() -> None:
    shipped = package_files("timm").joinpath("data/_info/imagenet_r_synsets.txt").read_text().split()
    assert imagenet_r.wnids("sorted") == shipped


@pytest.mark.parametrize("order", ["sorted", "published"])
def test_both_label_orders_number_the_same_classes(order: LabelOrder) -> None:
    assert set(imagenet_r.wnids(order)) == set(per_class(imagenet_r.files()))


def test_published_labels_are_not_sorted() -> None:
    assert imagenet_r.wnids("published")[:3] == ["n02165456", "n03594945", "n02325366"]


def test_published_labels_in_another_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    baked = imagenet_r._baked()
    first, second, *others = baked["published_label_order"]
    exchanged = baked | {"published_label_order": [second, first, *others]}
    monkeypatch.setattr(imagenet_r, "_baked", lambda: exchanged)
    assert imagenet_r.wnids("sorted")[0] == "n01443537"
    with pytest.raises(
        ValueError, match=r"of ImageNet-R's published labels has the sha256 .* published 4678d02857786285…"
    ):
        imagenet_r.wnids("published")
