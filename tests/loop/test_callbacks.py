from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cl_bench.loop.callbacks import StreamMetrics
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.network.backbones import Backbone
from cl_bench.results.result import Protocol, Result, Row
from datamodules.toy import Toy
from strategies.linear_probe import LinearProbe


def result(experiences: list[tuple[int, int]], test_images: list[int], domains: list[str]) -> Result:
    return Result(
        strategy="S",
        dataset="D",
        experiences=experiences,
        class_names=[str(c) for c in range(experiences[-1][1])],
        test_images=test_images,
        order="identity",
        seed=0,
        regime="sequential",
        protocol=Protocol({}, {}, {}),
        domains=domains,
    )


def evaluated(result: Result, row: int, *batches: tuple[Tensor, ...]) -> list[Row | None]:
    """The rows of ``result`` after an evaluation of batches: logits, labels and, perhaps, domains."""
    metrics, trainer, module = StreamMetrics(result), StreamTrainer(accelerator="cpu"), LightningModule()
    metrics.row = row
    metrics.on_test_start(trainer, module)
    for index, (logits, *rest) in enumerate(batches):
        metrics.on_test_batch_end(trainer, module, logits, (None, *rest), index)
    metrics.on_test_end(trainer, module)
    return result.rows


LOGITS = torch.tensor(
    [
        [9.0, 1.0, 0.0],  # class 0: right
        [9.0, 1.0, 0.0],  # class 1: wrong class, right experience
        [1.0, 2.0, 9.0],  # class 1: wrong experience, right within its own
        [9.0, 0.0, 1.0],  # class 2: wrong experience, right within its own (it has no other class)
    ]
)
LABELS = torch.tensor([0, 1, 1, 2])


def test_images_are_counted_in_three_ways() -> None:
    first, row = evaluated(result([(0, 2), (2, 3)], [1, 2, 1], []), 1, (LOGITS, LABELS))
    assert first is None
    assert row is not None
    assert row.correct == [1, 0, 0]
    assert row.correct_within_experience == [1, 1, 1]
    assert row.correct_experience == [1, 1, 0]
    assert row.correct_by_domain == []


def test_counts_do_not_depend_on_how_images_are_split_into_batches() -> None:
    batches = [(LOGITS[i : i + 1], LABELS[i : i + 1]) for i in range(4)]
    split, whole = (
        evaluated(result([(0, 2), (2, 3)], [1, 2, 1], []), 1, *each) for each in (batches, [(LOGITS, LABELS)])
    )
    assert split == whole


def test_an_evaluation_fills_the_row_that_the_trainer_names() -> None:
    stream = result([(0, 2), (2, 3)], [1, 2, 1], [])
    seen = torch.tensor([True, True, True, False])
    evaluated(stream, 0, (LOGITS[seen][:, :2], LABELS[seen]))
    assert len(stream.rows) == 1
    evaluated(stream, 1, (LOGITS, LABELS))
    assert [row and len(row.correct) for row in stream.rows] == [2, 3]


def test_correct_images_are_also_counted_by_domain() -> None:
    correct, labels, domains = torch.tensor([[1, 0, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]])
    logits = torch.nn.functional.one_hot(torch.where(correct.bool(), labels, 1 - labels), 2).float()
    batch = (logits, labels, domains)
    row = evaluated(result([(0, 1), (1, 2), (2, 3)], [4, 6, 1], ["photo", "sketch"]), 1, batch, batch)[1]
    assert row is not None
    assert row.correct_by_domain == [[2, 2], [0, 4]]
    assert row.correct == [2, 6]


class Groups(Callback):
    """Keeps the options of the optimizer at the first step."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.groups = [dict(group) for group in trainer.optimizers[0].param_groups]


@pytest.mark.parametrize(
    ("settings", "fused"), [({}, True), ({"fused": False}, False), ({"foreach": True}, None)]
)
def test_an_optimizer_steps_in_one_kernel_unless_a_setting_says_otherwise(
    settings: dict[str, Any], fused: bool | None, backbone: Callable[..., Backbone]
) -> None:
    strategy = LinearProbe(backbone(), optimizer=lambda groups: torch.optim.AdamW(groups, **settings))
    groups = Groups()
    trainer = StreamTrainer(max_epochs=1, accelerator="cpu", callbacks=groups)
    trainer.run(strategy, Toy(num_classes=2, num_experiences=1, image_size=8, batch_size=1000))
    assert [group["fused"] for group in groups.groups] == [fused]
