from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cl_bench.data.sources import ArraySource
from cl_bench.data.stream import Stream, class_order, deal, experience_sizes, order_name
from datamodules.toy import Toy


def source(labels: Sequence[int]) -> ArraySource:
    """Images (N, 3, 2, 2), each filled with its own index."""
    index = torch.arange(len(labels), dtype=torch.uint8)
    return ArraySource(index[:, None, None, None].expand(-1, 3, 2, 2).contiguous(), labels)


def scaled(image: Tensor) -> Tensor:
    return image / 255


TRAIN = [3, 0, 1, 2, 2, 1, 0, 3, 3, 1]
TEST = [1, 3, 0, 2, 2, 0]


def unequal_stream() -> Stream:
    return deal(source(TRAIN), source(TEST), order=(2, 3, 1, 0), sizes=[3, 1])


@pytest.mark.parametrize(
    ("num_classes", "first", "sha256"),
    [
        (100, [68, 56, 78, 8, 23, 84, 90, 65], "e90204efdce7db6c"),
        (200, [168, 136, 51, 9, 183, 101, 171, 99], "b113214bc61598d0"),
        (345, [214, 80, 343, 268, 224, 97, 253, 55], "2f203e267c847ffd"),
    ],
)
def test_numpy_1993_is_the_published_order(num_classes: int, first: list[int], sha256: str) -> None:
    order = list(class_order("numpy:1993", num_classes))
    assert order[:8] == first
    assert hashlib.sha256(json.dumps(order).encode()).hexdigest().startswith(sha256)


def test_python_order_is_pythons_shuffle() -> None:
    state = random.getstate()
    random.seed(3)
    expected = list(range(20))
    random.shuffle(expected)
    random.setstate(state)
    assert class_order("python:3", 20) == tuple(expected)


def test_identity_keeps_the_labels() -> None:
    assert class_order("identity", 4) == (0, 1, 2, 3)


def test_a_list_is_its_own_order() -> None:
    assert class_order([2, 0, 1], 3) == (2, 0, 1)


@pytest.mark.parametrize(
    ("order", "meant"),
    [
        ("numpi:7", "numpy:7"),
        ("numpy-1993", "numpy:1993"),
        ("numpy", "numpy:SEED"),
        ("1993", "numpy:1993"),
        ("Python:2", "python:2"),
        ("identitty", "identity"),
    ],
)
def test_an_unknown_order_names_the_nearest(order: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"class order '{order}' is unknown: did you mean {meant}\\?"):
        class_order(order, 10)
    with pytest.raises(ValueError, match=f"did you mean {meant}\\?"):
        order_name(order)


def test_a_seed_too_large_for_numpy_is_refused() -> None:
    with pytest.raises(ValueError, match="NumPy takes no seed above 4294967295"):
        class_order("numpy:4294967296", 10)


@pytest.mark.parametrize(
    ("order", "fault"),
    [
        ([0, 1], "lacks 2:"),
        ([0, 1, 1], "lacks 2 and cannot hold 1:"),
        ([0, 1, 2, 5], "cannot hold 5:"),
    ],
)
def test_a_list_that_is_not_a_permutation_is_refused(order: list[int], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        class_order(order, 3)


def test_order_names_are_fit_for_a_path() -> None:
    assert order_name("identity") == "identity"
    assert order_name("python:5") == "python-5"
    assert order_name([1, 0]) == order_name((1, 0))
    assert order_name([1, 0]) != order_name([0, 1])


def test_345_classes_are_not_dealt_into_10_experiences() -> None:
    with pytest.raises(
        ValueError, match=r"345 .* 10 experiences, 5 would remain: choose 5 or 15 experiences"
    ):
        experience_sizes(345, num_experiences=10)


def test_345_classes_are_dealt_into_5_experiences() -> None:
    assert experience_sizes(345, num_experiences=5) == [69] * 5


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 400), st.integers(-3, 410))
def test_equal_experiences_hold_every_class_or_are_refused(num_classes: int, number: int) -> None:
    if number >= 1 and num_classes % number == 0:
        sizes = experience_sizes(num_classes, num_experiences=number)
        assert len(sizes) == number
        assert sum(sizes) == num_classes
        assert len(set(sizes)) == 1
        assert experience_sizes(num_classes, num_classes_per_experience=sizes[0]) == sizes
    else:
        with pytest.raises(ValueError, match="cannot be dealt"):
            experience_sizes(num_classes, num_experiences=number)
        with pytest.raises(ValueError, match="cannot be dealt"):
            experience_sizes(num_classes, num_classes_per_experience=number)


@pytest.mark.parametrize(
    ("number", "sizes", "fault"),
    [
        (None, None, "The number or the size of the experiences is missing"),
        (5, 2, "Both num_experiences"),
        (None, [4, 4], "hold 8 classes and the dataset has 10"),
        (None, [10, 0], "leave an experience empty"),
        (None, [], "leave an experience empty"),
    ],
)
def test_a_division_that_fits_nothing_is_refused(
    number: int | None, sizes: int | list[int] | None, fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        experience_sizes(10, number, sizes)


def test_experiences_take_contiguous_positions() -> None:
    stream = unequal_stream()
    assert [experience.classes for experience in stream.experiences] == [range(0, 3), range(3, 4)]
    assert [experience.index for experience in stream.experiences] == [0, 1]
    assert {experience.num_experiences for experience in stream.experiences} == {2}


def test_an_experience_names_its_own_classes_and_no_others() -> None:
    names = ["ant", "bee", "cat", "dog"]
    stream = deal(source(TRAIN), source(TEST), (2, 3, 1, 0), [3, 1], class_names=names)
    assert [experience.class_names for experience in stream.experiences] == [("cat", "dog", "bee"), ("ant",)]
    assert [experience.class_names for experience in unequal_stream().experiences] == [(), ()]


def test_every_image_is_dealt_once_to_the_experience_of_its_class() -> None:
    stream = unequal_stream()
    for labels, dealt in ((TRAIN, stream.train_indices), (TEST, stream.test_indices)):
        assert sorted(np.concatenate(dealt).tolist()) == list(range(len(labels)))
        for experience, indices in zip(stream.experiences, dealt, strict=True):
            positions = {stream.order.index(labels[index]) for index in indices.tolist()}
            assert positions == set(experience.classes)


def test_avalanches_experiences_hold_the_same_images_and_positions() -> None:
    train, test = source(TRAIN), source(TEST)
    stream = deal(train, test, (2, 3, 1, 0), [3, 1], test_transform=scaled)
    for experience, indices in zip(stream.benchmark.train_stream, stream.train_indices, strict=True):
        for (image, position, *_), index in zip(experience.dataset, indices, strict=True):
            assert torch.equal(image, train[index][0])
            assert position == stream.order.index(train[index][1])
    for experience, indices in zip(stream.benchmark.test_stream, stream.test_indices, strict=True):
        for (image, position, *_), index in zip(experience.dataset, indices, strict=True):
            assert torch.equal(image, test[index][0] / 255)
            assert position == stream.order.index(test[index][1])


def test_dealing_leaves_the_global_generators_untouched() -> None:
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    for order in ("numpy:1", "python:1"):
        deal(source(TRAIN), source(TEST), class_order(order, 4), [2, 2])
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_equal(np.random.get_state(), numpy_state)
    assert random.getstate() == python_state


def test_a_class_without_an_image_is_refused() -> None:
    with pytest.raises(ValueError, match="test images lack the classes 2"):
        deal(source(TRAIN), source([0, 1, 3]), range(4), [2, 2])


def test_a_label_outside_the_order_is_refused() -> None:
    with pytest.raises(ValueError, match="training images have labels 3, outside 0 to 2"):
        deal(source(TRAIN), source([0, 1, 2]), range(3), [3])


def test_an_avalanche_strategy_trains_on_the_stream() -> None:
    data = Toy(num_experiences=2, order="numpy:1")
    data.setup()
    # Avalanche's strategies are imported once a stream is dealt, which keeps the import quiet.
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.logging import TextLogger
    from avalanche.training import Naive
    from avalanche.training.plugins import EvaluationPlugin

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 6))
    naive = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.2),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=18,
        train_epochs=4,
        evaluator=EvaluationPlugin(accuracy_metrics(experience=True), loggers=TextLogger(io.StringIO())),
    )
    rows = []
    for experience in data.stream.benchmark.train_stream:
        naive.train(experience)
        rows.append(list(naive.eval(data.stream.benchmark.test_stream).values()))
    (first, unseen), (first_later, second) = rows
    assert first > 0.8
    assert second > 0.8
    assert unseen == 0
    assert first_later < first
