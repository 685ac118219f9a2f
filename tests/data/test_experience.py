import pytest

from cl_bench.data.experience import Experience


def test_an_experience_counts_its_own_classes_and_those_seen() -> None:
    last = Experience(index=2, num_experiences=3, classes=range(4, 10))
    assert (last.num_classes, last.num_classes_seen, last.is_first) == (6, 10, False)


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_outside_the_stream_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match="from 0 to 2"):
        Experience(index=index, num_experiences=3, classes=range(2))


@pytest.mark.parametrize("classes", [range(4, 4), range(0, 6, 2)])
def test_classes_are_a_contiguous_range(classes: range) -> None:
    with pytest.raises(ValueError, match="contiguous, non-empty"):
        Experience(index=0, num_experiences=1, classes=classes)


def test_there_is_one_name_for_each_class_or_none() -> None:
    assert Experience(0, 1, range(2)).class_names == ()
    assert Experience(0, 1, range(2), ("ant", "bee")).class_names == ("ant", "bee")
    with pytest.raises(ValueError, match="Experience 0 brings 2 classes, not 1: give class_names one name"):
        Experience(0, 1, range(2), ("ant",))
