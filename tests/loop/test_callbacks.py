import torch

from cl_bench.loop.callbacks import StreamMetrics
from cl_bench.results.result import Protocol, Result


def result(experiences: list[tuple[int, int]]) -> Result:
    num_classes = experiences[-1][1]
    return Result(
        strategy="S",
        dataset="D",
        experiences=experiences,
        class_names=[str(c) for c in range(num_classes)],
        test_images=[1] * num_classes,
        order="identity",
        seed=0,
        regime="sequential",
        protocol=Protocol({}, {}, {}),
    )


def test_right_answers_are_counted_by_domain() -> None:
    two_domains = result([(0, 2), (2, 3)])
    two_domains.domains = ["photo", "sketch"]
    metrics = StreamMetrics(two_domains)
    correct, labels, domains = torch.tensor([[1, 0, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]])
    metrics._count_by_domain(correct.bool(), labels, domains)
    metrics._count_by_domain(correct.bool(), labels, domains)
    assert metrics.correct_by_domain.tolist() == [[2, 2, 0], [0, 4, 0]]


def test_a_hand_made_batch_is_counted_three_ways() -> None:
    metrics = StreamMetrics(result([(0, 2), (2, 3)]))
    logits = torch.tensor(
        [
            [9.0, 1.0, 0.0],  # class 0: right
            [9.0, 1.0, 0.0],  # class 1: wrong class, right experience
            [1.0, 2.0, 9.0],  # class 1: wrong experience, right within its own
            [9.0, 0.0, 1.0],  # class 2: wrong experience, right within its own (there is no other class)
        ]
    )
    labels = torch.tensor([0, 1, 1, 2])
    metrics.confusion.update(logits.argmax(1), labels)
    metrics.confusion_within.update(metrics._within_experience(logits, labels).argmax(1), labels)
    row = metrics._row(metrics.confusion.confmat, metrics.confusion_within.confmat, torch.zeros(0, 3))
    assert row.correct == [1, 0, 0]
    assert row.correct_within_experience == [1, 1, 1]
    assert row.correct_experience == [1, 1, 0]
