import pytest
import torch

from cl_bench.measure.alignment import class_halves, looking_ahead


@pytest.mark.parametrize("classes", (2, 5, 8))
def test_halves_share_no_class_and_hold_every_image(classes: int) -> None:
    labels = torch.arange(24) % classes
    torch.manual_seed(0)
    halves = class_halves(torch.arange(24), labels)
    assert halves is not None
    (first, of_first), (second, of_second) = halves
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(24))
    assert len(of_first.unique()) == classes // 2
    assert not set(of_first.tolist()) & set(of_second.tolist())


def test_halves_change_from_draw_to_draw() -> None:
    labels = torch.arange(8)
    drawn = {tuple(halves[0][1].tolist()) for _ in range(10) if (halves := class_halves(labels, labels))}
    assert len(drawn) > 3


def test_a_single_class_has_no_halves() -> None:
    assert class_halves(torch.arange(3), torch.tensor([4, 4, 4])) is None


def test_tensors_come_back_bit_for_bit_even_if_something_breaks() -> None:
    weight = torch.randn(5, generator=torch.Generator().manual_seed(0)) / 3
    before = weight.clone()
    with pytest.raises(RuntimeError), looking_ahead([weight], [torch.ones(5)], 0.7):
        assert (weight - before).norm() == pytest.approx(0.7, rel=1e-5)
        raise RuntimeError
    assert torch.equal(weight, before)


def test_a_gradient_of_zero_moves_nothing() -> None:
    weight = torch.ones(3)
    with looking_ahead([weight], [torch.zeros(3)], 0.7):
        assert torch.equal(weight, torch.ones(3))
