"""What is kept of training images is found wherever it is."""

import io
import string
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cl_bench.check.command import layer
from cl_bench.check.leftovers import Kept, kept
from cl_bench.check.subject import Subject
from cl_bench.run.run import quiet

WRONG = Path(__file__).with_name("wrong_data.py")
PIXELS = 3 * 16 * 16

Keep = Callable[[Any, Tensor], None]


def in_a_list_of_numbers(strategy: Any, images: Tensor) -> None:
    strategy.kept = [*getattr(strategy, "kept", []), *(images.flatten() * 255).int().tolist()]


def in_text(strategy: Any, images: Tensor) -> None:
    strategy.kept = getattr(strategy, "kept", "") + pixels(images).tobytes().hex()


def in_a_closure(strategy: Any, images: Tensor) -> None:
    older: Callable[[], list[Tensor]] = getattr(strategy, "recall", list)
    strategy.recall = lambda: [*older(), images]


def in_a_partial(strategy: Any, images: Tensor) -> None:
    strategy.recall = partial(print, getattr(strategy, "recall", None), images.numpy())


def in_an_attribute_of_a_layer(strategy: Any, images: Tensor) -> None:
    layer = strategy.backbone.blocks[0].norm1
    layer.kept = (getattr(layer, "kept", None), (pixels(images), 1))


def in_pictures(strategy: Any, images: Tensor) -> None:
    own = [Image.fromarray(np.moveaxis(image, 0, 2)) for image in pixels(images)]
    strategy.kept = [*getattr(strategy, "kept", []), *own]


def in_a_view(strategy: Any, images: Tensor) -> None:
    strategy.kept = [*getattr(strategy, "kept", []), pixels(images).copy()[:1, :1]]


def in_the_class(strategy: Any, images: Tensor) -> None:
    type(strategy).shelf.append(pixels(images).copy())


def in_an_attribute_of_the_class(strategy: Any, images: Tensor) -> None:
    type(strategy).text = getattr(strategy, "text", b"") + pixels(images).tobytes()


def in_the_data(strategy: Any, images: Tensor) -> None:
    strategy.trainer.datamodule.train.cache = images
    strategy.trainer.datamodule.cache = getattr(strategy.trainer.datamodule, "cache", b"") + bytes(
        pixels(images)
    )


def in_a_library(strategy: Any, images: Tensor) -> None:
    torch.kept = [*getattr(torch, "kept", []), images]  # type: ignore[attr-defined]


def in_a_stream_of_bytes(strategy: Any, images: Tensor) -> None:
    if not hasattr(strategy, "kept"):
        strategy.kept = io.BytesIO()
    strategy.kept.write(images.numpy().tobytes())


def in_a_file(strategy: Any, images: Tensor) -> None:
    np.save(f"images{strategy.experience.index}.npy", pixels(images))


def in_a_file_of_torch(strategy: Any, images: Tensor) -> None:
    torch.save(images, f"images{strategy.experience.index}.pt")


def in_a_mapped_file(strategy: Any, images: Tensor) -> None:
    name = f"images{strategy.experience.index}.map"
    np.memmap(name, mode="w+", shape=tuple(images.shape), dtype=np.uint8)[:] = pixels(images)


def older_an_object_of_the_module(strategy: Any, images: Tensor) -> None:
    SHELF.text += pixels(images).tobytes()


def older_a_default_argument(strategy: Any, images: Tensor, kept: list[Any] = []) -> None:  # noqa: B006
    kept.append(pixels(images).tobytes())


def older_an_empty_default_argument(strategy: Any, images: Tensor, kept: dict[int, Any] = {}) -> None:  # noqa: B006
    kept[len(kept)] = pixels(images).copy()


def older_a_dictionary_of_the_module(strategy: Any, images: Tensor) -> None:
    DICTIONARY[len(DICTIONARY)] = pixels(images).copy()


def older_an_imported_module(strategy: Any, images: Tensor) -> None:
    string.kept.append(pixels(images).tobytes())  # type: ignore[attr-defined]


def older_an_attribute_of_an_imported_module(strategy: Any, images: Tensor) -> None:
    string.text += pixels(images).tobytes()  # type: ignore[attr-defined]


def older_a_buffer_of_the_module(strategy: Any, images: Tensor) -> None:
    BUFFER.extend(pixels(images).tobytes())


def older_a_tensor_of_the_module(strategy: Any, images: Tensor) -> None:
    TENSOR.data = torch.cat([TENSOR, (images * 255).to(torch.uint8).flatten()])


def older_another_class(strategy: Any, images: Tensor) -> None:
    Shelf.texts = (*Shelf.texts, pixels(images).tobytes())


def older_an_attribute_of_a_function(strategy: Any, images: Tensor) -> None:
    pixels.kept = getattr(pixels, "kept", b"") + pixels(images).tobytes()  # type: ignore[attr-defined]


class Shelf:
    """A place that exists before anything is trained."""

    texts: ClassVar[tuple[bytes, ...]] = ()
    text = b""


SHELF, DICTIONARY, BUFFER, TENSOR = Shelf(), dict[int, Any](), bytearray(), torch.empty(0, dtype=torch.uint8)

OLDER_PLACES = [place for name, place in list(globals().items()) if name.startswith("older_")]
PLACES = [place for name, place in list(globals().items()) if name.startswith("in_")]


def pixels(images: Tensor) -> Any:
    return (images * 255).to(torch.uint8).numpy()


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(string, "kept", [], raising=False)
    monkeypatch.setattr(string, "text", b"", raising=False)
    yield
    vars(torch).pop("kept", None)


def found(keep: Keep, monkeypatch: pytest.MonkeyPatch) -> Kept:
    with quiet():
        subject = Subject(layer(f"{WRONG}:KeepsElsewhere"))
        wrong: Any = sys.modules[WRONG.stem]
        wrong.KeepsElsewhere.shelf.clear()
        monkeypatch.setattr(wrong.KeepsElsewhere, "keep", keep)
        return kept(subject)


@pytest.mark.parametrize("keep", PLACES, ids=lambda keep: keep.__name__)
def test_images_are_found_in_every_place(keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    left = found(keep, monkeypatch)
    assert left.in_memory + left.in_files > PIXELS / 2  # the last experience has half of the images


def test_images_in_every_place_that_existed_before_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(strategy: Any, images: Tensor) -> None:
        for place in OLDER_PLACES:
            place(strategy, images)

    left = found(keep, monkeypatch)
    assert left.in_memory == pytest.approx(len(OLDER_PLACES) * PIXELS, rel=0.05)


def test_statistics_of_a_class_leave_nothing_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(strategy: Any, images: Tensor) -> None:
        strategy.kept = [*getattr(strategy, "kept", []), images.mean(dim=0)]
        np.save(f"mean{strategy.experience.index}.npy", images.mean(dim=0))
        print(len(images) * "printed ")

    left = found(keep, monkeypatch)
    assert left.in_memory < 16
    assert left.in_files == 0


def test_the_files_of_a_method_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    left = found(in_a_file, monkeypatch)
    assert left.files == ["images0.npy", "images1.npy"]
    assert left.in_files == pytest.approx(PIXELS)
