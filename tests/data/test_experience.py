import pytest

from cl_bench.data.experience import Experience


def test_experience_knows_only_its_own_place_and_classes() -> None:
    last = Experience(index=2, num_experiences=3, classes=range(4, 10))
    assert (last.num_classes, last.num_classes_seen, last.is_first, last.is_last) == (6, 10, False, True)
    assert set(vars(last)) == {"index", "num_experiences", "classes"}


@pytest.mark.parametrize("index", [-1, 3])
def test_an_experience_outside_its_stream_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match="from 0 to 2"):
        Experience(index=index, num_experiences=3, classes=range(2))


@pytest.mark.parametrize("classes", [range(4, 4), range(0, 6, 2)])
def test_classes_are_a_contiguous_range(classes: range) -> None:
    with pytest.raises(ValueError, match="contiguous, non-empty"):
        Experience(index=0, num_experiences=1, classes=classes)
