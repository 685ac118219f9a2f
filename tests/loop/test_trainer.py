import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cl_bench.contracts.strategy import Strategy, TrainingData
from cl_bench.data.experience import Experience
from cl_bench.loop.course import Diverged, OutOfMemory
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.network.backbones import Backbone
from cl_bench.results.result import FILE_NAME, Result, read
from datamodules.toy import Toy
from strategies.linear_probe import LinearProbe
from strategies.lora import LoRA
from strategies.ncm import NearestClassMean

Making = Callable[..., Backbone]


def toy(**changes: Any) -> Toy:
    arguments = {"num_classes": 6, "num_experiences": 3, "image_size": 8, "seed": 1, "batch_size": 16}
    return Toy(**arguments | changes)


def trainer(**changes: Any) -> StreamTrainer:
    arguments: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu"}
    return StreamTrainer(**arguments | changes)


class Diary(Strategy):
    """A linear probe that records its hooks in the order in which they are called."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.lines: list[str] = []
        self.batches: list[tuple[Tensor, Tensor]] = []

    def expand(self, experience: Experience) -> None:
        super().expand(experience)
        self.lines.append(f"expand {experience.index}")

    def before_training(self, data: TrainingData) -> None:
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        self.lines.append("before_training")
        self.batches += data.plain()

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        self.lines.append("loss")
        return super().loss(features, labels)

    def rectify_gradients(self) -> None:
        self.lines.append("rectify_gradients")

    def after_step(self) -> None:
        self.lines.append("after_step")

    def after_training(self, data: TrainingData) -> None:
        self.lines.append("after_training")


def test_the_hooks_are_called_in_the_order_of_the_contract(backbone: Making) -> None:
    strategy = Diary(backbone())
    trainer(max_epochs=1).run(strategy, toy(batch_size=1000))
    one = ["before_training", "loss", "rectify_gradients", "after_step", "after_training"]
    assert strategy.lines == [line for index in range(3) for line in (f"expand {index}", *one)]


def test_measurements_see_every_training_image_of_the_experience_once(backbone: Making) -> None:
    strategy, datamodule = Diary(backbone()), toy()
    trainer().run(strategy, datamodule)
    labels = torch.cat([labels for _, labels in strategy.batches])
    per_class = len(datamodule.sources().train) // 6
    assert torch.bincount(labels).tolist() == [per_class] * 6


def test_every_row_counts_every_test_image_of_the_classes_seen(backbone: Making) -> None:
    result = trainer().run(LoRA(backbone(), rank=2), toy())
    assert result.status == "done"
    assert [len(row.correct) for row in result.rows if row] == [2, 4, 6]
    for row in filter(None, result.rows):
        for kind in (row.correct, row.correct_within_experience, row.correct_experience):
            assert all(0 <= count <= total for count, total in zip(kind, result.test_images, strict=False))
        # Right among all classes is right among fewer, and lies in the right experience.
        for a, b, c in zip(row.correct, row.correct_within_experience, row.correct_experience, strict=True):
            assert a <= min(b, c)


def test_counts_equal_those_of_a_plain_loop_over_the_test_images(backbone: Making) -> None:
    strategy, datamodule = NearestClassMean(backbone()), toy()
    result = trainer().run(strategy, datamodule)
    sources = datamodule.sources()
    transform = datamodule.test_transform()
    correct, within, placed = [0] * 6, [0] * 6, [0] * 6
    strategy.eval()
    for index in range(len(sources.test)):
        image, label = sources.test[index]
        with torch.no_grad():
            logits = strategy(transform(image)[None])[0]
        first = label // 2 * 2
        correct[label] += int(logits.argmax()) == label
        within[label] += int(logits[first : first + 2].argmax()) + first == label
        placed[label] += int(logits.argmax()) // 2 == label // 2
    row = result.rows[-1]
    assert row is not None
    assert (row.correct, row.correct_within_experience, row.correct_experience) == (correct, within, placed)


def test_the_same_seed_gives_the_same_counts_and_weights_and_another_seed_does_not(backbone: Making) -> None:
    def learnt(seed: int) -> tuple[list[Any], dict[str, Tensor]]:
        strategy = LoRA(backbone(), rank=2, optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
        rows = trainer().run(strategy, toy(seed=seed)).rows
        return rows, strategy.state_dict()

    torch.manual_seed(0)
    rows, state = learnt(1)
    torch.manual_seed(99)
    again, same_state = learnt(1)
    other_state = learnt(2)[1]
    assert again == rows
    assert all(torch.equal(tensor, same_state[name]) for name, tensor in state.items())
    assert not torch.equal(state["head.parts.2.weight"], other_state["head.parts.2.weight"])


def test_one_trainer_counts_its_steps_through_the_whole_stream(backbone: Making) -> None:
    stream_trainer, datamodule = trainer(max_epochs=2), toy()
    stream_trainer.run(LinearProbe(backbone()), datamodule)
    images = len(datamodule.sources().train) // 3
    assert stream_trainer.global_step == 3 * 2 * -(-images // 16)


def test_the_joint_regime_is_one_experience_evaluated_per_original_one(backbone: Making) -> None:
    strategy, datamodule = LoRA(backbone(), rank=2), toy()
    result = trainer().run(strategy, datamodule, regime="joint")
    assert strategy.experience.class_names == tuple(datamodule.class_names)
    assert [row is None for row in result.rows] == [True, True, False]
    assert len(result.costs) == 1
    row = result.rows[-1]
    assert row is not None
    assert len(row.correct) == 6
    assert math.isnan(result.metrics()["maa/sample"])


def test_a_strategy_without_training_still_measures(backbone: Making) -> None:
    strategy = NearestClassMean(backbone())
    result = trainer().run(strategy, toy())
    assert strategy.head.means.abs().sum(dim=1).min() > 0
    assert [cost.trainable_parameters for cost in result.costs] == [0, 0, 0]


def test_nearest_class_means_end_equal_for_every_class_order(backbone: Making) -> None:
    def confused(order: str) -> int:
        row = trainer().run(NearestClassMean(backbone()), toy(order=order)).rows[-1]
        assert row is not None
        return sum(row.correct)

    assert confused("identity") == confused("numpy:3")


def test_cost_is_recorded_for_every_experience(backbone: Making) -> None:
    result = trainer().run(LoRA(backbone(), rank=2), toy())
    assert len(result.costs) == 3
    for cost in result.costs:
        assert cost.seconds.keys() == {"data_passes", "training", "evaluation", "checkpoints"}
        assert min(cost.seconds.values()) >= 0
        assert cost.peak_memory_bytes > 2**20


def test_the_result_file_is_rewritten_after_every_experience(backbone: Making, tmp_path: Path) -> None:
    seen: list[int] = []

    class Reader(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            path = tmp_path / FILE_NAME
            assert read(path).status == "running"
            seen.append(len(read(path).rows))

    result = trainer(callbacks=Reader()).run(LinearProbe(backbone()), toy(), folder=tmp_path)
    assert seen == [0, 1, 2]
    assert read(tmp_path / FILE_NAME) == result


class Exploding(LinearProbe):
    """Its loss is NaN from the second experience on."""

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        loss = super().loss(features, labels)
        return loss if self.experience.is_first else loss * torch.nan


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(backbone: Making, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"at step 5, in epoch 1 of experience 2: lower the learning rate"):
        trainer().run(Exploding(backbone()), toy(), folder=tmp_path)
    result = read(tmp_path / FILE_NAME)
    assert result.status == "diverged"
    assert len(result.rows) == 1


class Exhausting(LinearProbe):
    """It allocates more memory than exists: in a step, or in the pass after training."""

    def __init__(self, backbone: Backbone, *, stepping: bool) -> None:
        super().__init__(backbone)
        self.stepping = stepping

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        if self.stepping:
            torch.empty(2**60)
        return super().loss(features, labels)

    def after_training(self, data: TrainingData) -> None:
        torch.empty(2**60)


@pytest.mark.parametrize(
    ("stepping", "words"),
    [(True, r"A batch of 16 .*lower --data\.batch_size"), (False, r"of 32 .*lower --data\.test_batch_size")],
)
def test_an_out_of_memory_error_names_the_batch_size(
    stepping: bool, words: str, backbone: Making, tmp_path: Path
) -> None:
    with pytest.raises(OutOfMemory, match=words):
        trainer().run(Exhausting(backbone(), stepping=stepping), toy(), folder=tmp_path)
    assert read(tmp_path / FILE_NAME).status == "failed"


class WithLittleSharedMemory(LinearProbe):
    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        # As torch prints it on a machine whose /dev/shm has 512 kB.
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_22513_1>: No space left on device (28)"
        )


def test_full_shared_memory_is_named_with_its_remedy(backbone: Making) -> None:
    with pytest.raises(OutOfMemory, match=r"choose fewer --num_workers, .* \(docker run --shm-size\)"):
        trainer().run(WithLittleSharedMemory(backbone()), toy())


class Failing(LinearProbe):
    """It breaks when it merges the second experience."""

    def after_training(self, data: TrainingData) -> None:
        if not self.experience.is_first:
            raise ArithmeticError("no basis left")


def test_a_failing_strategy_leaves_its_rows_and_its_error(backbone: Making, tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError):
        trainer().run(Failing(backbone()), toy(), folder=tmp_path)
    result: Result = read(tmp_path / FILE_NAME)
    assert (result.status, result.error, len(result.rows)) == ("failed", "ArithmeticError: no basis left", 1)


def test_images_of_another_size_than_the_backbones_are_refused_before_training(backbone: Making) -> None:
    with pytest.raises(ValueError, match="takes images of 16 pixels and the datamodule gives 8"):
        trainer().run(LinearProbe(backbone(img_size=16)), toy())


class Peeking(LinearProbe):
    """It records everything that it receives with a test image."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.seen: set[str] = set()

    def forward(self, images: Tensor) -> Tensor:
        if self.trainer.testing:
            self.seen |= {type(images).__name__, str(images.dtype), str(images.ndim)}
        return super().forward(images)


def test_at_test_time_a_strategy_receives_only_images(backbone: Making) -> None:
    strategy = Peeking(backbone())
    trainer().run(strategy, toy())
    assert strategy.seen == {"Tensor", "torch.float32", "4", "2"}  # batches of four, and the rest


def test_the_backbone_stays_frozen_while_a_probe_trains(backbone: Making) -> None:
    strategy = LinearProbe(backbone(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5))
    before = {name: tensor.clone() for name, tensor in strategy.backbone.state_dict().items()}
    trainer().run(strategy, toy())
    for name, tensor in strategy.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


class Merging(LoRA):
    """It compares the merged weight with the weight and the product of factors before."""

    def after_training(self, data: TrainingData) -> None:
        layer = self.layers[0]
        before, delta = layer.weight.clone(), layer.adapter("k").delta().clone()
        self.precise = not torch.is_autocast_enabled("cpu")
        images = next(iter(data.plain()))[0]
        exact = self.backbone.vit((images - self.backbone.mean) / self.backbone.std)
        self.coarseness = float((self.features(images) - exact).abs().max())
        super().after_training(data)
        self.error = float((layer.weight[layer.rows["k"]] - before[layer.rows["k"]] - delta).abs().max())


def test_mixed_precision_reaches_images_but_not_the_merge(backbone: Making) -> None:
    strategy = Merging(backbone(), rank=2, optimizer=lambda p: torch.optim.Adam(p, lr=0.05))
    result = trainer(precision="bf16-mixed").run(strategy, toy())
    assert strategy.precise
    assert strategy.coarseness > 1e-4
    assert strategy.error < 1e-6
    assert result.protocol.identity["precision"] == "bf16-mixed"


@pytest.mark.parametrize(
    "setting", [{"fast_dev_run": True}, {"max_steps": 3}, {"max_epochs": -1}, {"max_time": "00:00:01:00"}]
)
def test_settings_that_would_cut_a_stream_short_are_refused(
    setting: dict[str, Any], backbone: Making
) -> None:
    with pytest.raises(ValueError, match="give max_epochs, 0 or more"):
        trainer(**setting).run(LinearProbe(backbone()), toy())


def test_a_result_needs_every_test_image(backbone: Making, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"16 of 24 test images|\d+ of \d+ images were evaluated"):
        trainer(limit_test_batches=1).run(LinearProbe(backbone()), toy(test_batch_size=2), folder=tmp_path)
    assert read(tmp_path / FILE_NAME).status == "failed"


class Merged(LinearProbe):
    """Its last step is finite; what it merges is not."""

    def after_training(self, data: TrainingData) -> None:
        next(self.head.parameters()).data.fill_(torch.nan)


def test_logits_that_are_not_finite_end_the_run_as_diverged(backbone: Making, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="not finite"):
        trainer(max_epochs=1).run(Merged(backbone()), toy(), folder=tmp_path)
    assert read(tmp_path / FILE_NAME).status == "diverged"


def test_a_strategy_that_has_learnt_a_stream_is_refused_for_another(backbone: Making) -> None:
    strategy = LinearProbe(backbone())
    trainer().run(strategy, toy())
    with pytest.raises(ValueError, match="has learnt 6 classes already"):
        trainer().run(strategy, toy())


class Interrupted(LinearProbe):
    """It receives a Ctrl-C in its second experience."""

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        if not self.experience.is_first:
            os.kill(os.getpid(), signal.SIGINT)
        return super().loss(features, labels)


def test_ctrl_c_leaves_finished_rows_and_the_former_handler(backbone: Making, tmp_path: Path) -> None:
    # A shell that starts the tests in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer().run(Interrupted(backbone()), toy(), folder=tmp_path)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    result = read(tmp_path / FILE_NAME)
    assert (result.status, result.error, len(result.rows)) == ("failed", "Interrupted.", 1)


class Clipped(LinearProbe):
    """Its rectified gradient is far longer than clipping allows."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))

    def rectify_gradients(self) -> None:
        for parameter in self.head.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(1e3)

    def before_training(self, data: TrainingData) -> None:
        self.start = [p.detach().clone() for p in self.head.parameters()]

    def after_step(self) -> None:
        moved = [(p - q).norm() ** 2 for p, q in zip(self.head.parameters(), self.start, strict=True)]
        self.length = float(sum(moved) ** 0.5)


def test_gradients_are_rectified_before_they_are_clipped(backbone: Making) -> None:
    strategy = Clipped(backbone())
    trainer(max_epochs=1, gradient_clip_val=0.5).run(strategy, toy(batch_size=1000, num_experiences=1))
    assert strategy.length == pytest.approx(0.5, rel=1e-3)


class Asleep(LinearProbe):
    """It sets its backbone to evaluation mode and records the mode in every step."""

    def expand(self, experience: Experience) -> None:
        super().expand(experience)
        self.backbone.eval()
        self.modes: set[bool] = set()

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        self.modes.add(self.backbone.training)
        return super().loss(features, labels)


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training")
def test_measuring_restores_the_mode_of_every_module(backbone: Making) -> None:
    strategy = Asleep(backbone())
    trainer(max_epochs=1).run(strategy, toy())
    assert strategy.modes == {False}


@pytest.mark.parametrize("precision", ("64-true", "bf16-true"))
def test_data_passes_see_images_in_the_precision_of_the_trainer(precision: Any, backbone: Making) -> None:
    result = trainer(precision=precision).run(NearestClassMean(backbone()), toy())
    assert result.metrics()["acc/sample"] > 100 / 6
