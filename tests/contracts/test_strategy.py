from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.contracts.strategy import Promises, Strategy, TrainingData
from cl_bench.data.experience import Experience
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.maths.schedules import QuarterCosine
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import Features, pooled
from cl_bench.results.result import Result
from datamodules.toy import Toy
from strategies.linear_probe import LinearProbe
from strategies.lora import LoRA
from strategies.ncm import NearestClassMean

FIRST, SECOND = Experience(0, 2, range(3)), Experience(1, 2, range(3, 5))


@pytest.fixture
def backbone(tiny_backbone: Callable[..., Backbone]) -> Backbone:
    return tiny_backbone()


def run(strategy: Strategy, *, precision: Any = "32-true", max_epochs: int = 1, **changes: Any) -> Result:
    settings = {"num_classes": 4, "num_experiences": 2, "image_size": 8, "batch_size": 8}
    trainer = StreamTrainer(max_epochs=max_epochs, accelerator="cpu", precision=precision)
    return trainer.run(strategy, Toy(**settings | changes))


def random_images(count: int) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


# Heads and losses


def test_the_head_grows_with_the_classes_seen(backbone: Backbone) -> None:
    strategy = LinearProbe(backbone)
    for experience in (FIRST, SECOND):
        strategy.expand(experience)
        assert strategy(random_images(4)).shape == (4, experience.num_classes_seen)


def test_only_the_current_head_learns_from_the_default_loss(backbone: Backbone) -> None:
    strategy = LinearProbe(backbone)
    strategy.expand(FIRST)
    strategy.expand(SECOND)
    strategy.loss(torch.rand(6, backbone.feature_dim), torch.tensor([3, 4] * 3)).backward()
    with_gradient = {name for name, p in strategy.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == {"head.parts.1.weight", "head.parts.1.bias"}


def test_the_experience_is_refused_before_the_first_expand(backbone: Backbone) -> None:
    with pytest.raises(RuntimeError, match="call expand"):
        _ = LinearProbe(backbone).experience


def test_the_batch_loss_is_the_loss_of_the_features_of_the_batch(backbone: Backbone) -> None:
    strategy, images, labels = LinearProbe(backbone), random_images(6), torch.tensor([0, 1, 2, 0, 1, 2])
    strategy.expand(FIRST)
    logits = strategy.head(backbone(images))
    torch.testing.assert_close(strategy.batch_loss((images, labels)), F.cross_entropy(logits, labels))
    rows, shares = torch.rand(6, 2), [torch.rand(3), torch.rand(2, 2)]
    assert strategy.whole_batch(rows) is rows and strategy.agreed(rows) is rows
    assert all(map(torch.equal, strategy.summed(shares), shares))


def test_the_batch_losses_of_all_processes_add_up_to_that_of_the_whole_batch(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy, images, labels = LinearProbe(backbone), random_images(6), torch.tensor([0, 1, 2, 0, 1, 2])
    strategy.expand(FIRST)
    trained = [p for p in strategy.parameters() if p.requires_grad]
    whole = strategy.batch_loss((images, labels))
    expected = torch.autograd.grad(whole, trained)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count: count.fill_(6))
    shares = [strategy.batch_loss((images[part], labels[part])) for part in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(sum(shares), whole)
    for found, right in zip(torch.autograd.grad(sum(shares), trained), expected, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(found, right)


class FewImages:
    """Two images of each of three classes, as training data."""

    batch = random_images(6), torch.tensor([0, 1, 2, 0, 1, 2])

    def augmented(self) -> list[tuple[Tensor, Tensor]]:
        return [self.batch]

    def plain(self) -> list[tuple[Tensor, Tensor]]:
        return [self.batch]


def test_a_head_starts_at_random_or_from_class_means(backbone: Backbone) -> None:
    data = FewImages()
    for start in ("random", "means"):
        strategy = LinearProbe(backbone, head_start=start)
        strategy.expand(FIRST)
        drawn = [parameter.detach().clone() for parameter in strategy.head.parameters()]
        strategy.start_head(data)
        kept = all(map(torch.equal, strategy.head.parameters(), drawn))
        assert kept is (start == "random")
    features = pooled(strategy.features(data.batch[0]))
    means = torch.stack([features[label::3].mean(dim=0) for label in range(3)])
    length = means.norm(dim=1).square().mean().sqrt()
    cosines = F.cosine_similarity(features[:, None], means[None], dim=2)
    expected = 30 * cosines * features.norm(dim=1, keepdim=True) / length
    torch.testing.assert_close(strategy.head(features), expected, atol=1e-4, rtol=1e-5)


def test_a_head_of_prototypes_needs_no_start(backbone: Backbone) -> None:
    strategy = NearestClassMean(backbone, head_start="means")
    strategy.expand(FIRST)
    strategy.start_head(FewImages())
    assert not strategy.head.means.any()


# Features


class Keyed(Strategy):
    """Pulls a learnt key towards the features, by a similarity that the forward pass computes."""

    def __init__(self, backbone: Backbone, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.key = nn.Parameter(torch.ones(backbone.feature_dim))
        self.received: list[bool] = []

    def features(self, images: Tensor) -> Features:
        found: Tensor = self.backbone(images)
        return Features(found, extra=F.cosine_similarity(found, self.key[None], dim=1))

    def loss(self, features: Tensor | Features, labels: Tensor) -> Tensor:
        assert isinstance(features, Features)
        self.received.append(features.extra.shape == labels.shape)
        entropy = super().loss(features, labels)
        pull: Tensor = features.extra.mean()
        return entropy - pull


def test_features_may_carry_what_the_loss_needs(backbone: Backbone) -> None:
    strategy = Keyed(backbone, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), head_start="means")
    images, labels = FewImages.batch
    strategy.expand(FIRST)
    strategy.start_head(FewImages())
    torch.testing.assert_close(strategy(images), strategy.head(backbone(images)))
    entropy = F.cross_entropy(strategy(images), labels)
    similarity = F.cosine_similarity(backbone(images), strategy.key[None], dim=1).mean()
    torch.testing.assert_close(strategy.batch_loss((images, labels)), entropy - similarity)


def test_a_term_made_in_the_forward_pass_is_trained_through_a_stream(backbone: Backbone) -> None:
    strategy = Keyed(backbone, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    before = strategy.key.detach().clone()
    run(strategy)
    assert strategy.received and all(strategy.received)
    assert not torch.equal(strategy.key, before)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_features_have_the_precision_of_training_and_hooks_full_precision(
    precision: str, backbone: Backbone
) -> None:
    equal: list[bool] = []

    class Spied(LinearProbe):
        def features(self, images: Tensor) -> Tensor:
            found = pooled(super().features(images))
            mixed = torch.autocast("cpu", torch.bfloat16)
            full = torch.autocast("cpu", enabled=False)
            for context in (mixed, full):
                with context:
                    equal.append(torch.equal(found, self.backbone.vit(images)))
            return found

        def before_training(self, data: TrainingData) -> None:
            assert not torch.is_autocast_enabled("cpu")
            self.features(next(iter(data.plain()))[0])

        def after_training(self, data: TrainingData) -> None:
            self.before_training(data)

    run(Spied(backbone), precision=precision)
    assert len(equal) > 8
    assert equal == [precision == "bf16-mixed", precision == "32-true"] * (len(equal) // 2)


# Optimizers


def optimizer_of(strategy: Strategy) -> torch.optim.Optimizer:
    found = strategy.configure_optimizers()
    assert isinstance(found, torch.optim.Optimizer)
    return found


def test_the_head_is_a_parameter_group_with_its_own_learning_rate(backbone: Backbone) -> None:
    strategy = LoRA(backbone, rank=2, head_lr=0.25, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    strategy.expand(FIRST)
    optimizer = optimizer_of(strategy)
    assert isinstance(optimizer, torch.optim.SGD)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in strategy.parameters() if p.requires_grad}
    assert len(trained) == len({id(p) for p in trained})


class Kept(LoRA):
    """One adapter and one optimizer for the whole stream."""

    optimizer_scope = "stream"


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.5)


def test_an_optimizer_of_the_stream_keeps_its_state_and_gains_new_parameters(backbone: Backbone) -> None:
    strategy = Kept(backbone, variant="shared", rank=2, optimizer=adam, head_lr=0.25)
    strategy.expand(FIRST)
    optimizer = optimizer_of(strategy)
    strategy.batch_loss(FewImages.batch).backward()
    optimizer.step()
    adapter = strategy.layers[0].adapter("v")
    state = {name: value.clone() for name, value in optimizer.state[adapter.B].items()}
    strategy.expand(SECOND)
    assert optimizer_of(strategy) is optimizer
    assert state["exp_avg"].any()
    assert all(torch.equal(value, state[name]) for name, value in optimizer.state[adapter.B].items())
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert {id(p) for p in strategy.parameters() if p.requires_grad} <= set(held)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25, 0.25]


def test_learning_rates_that_a_method_has_set_stay(backbone: Backbone) -> None:
    strategy = Kept(backbone, variant="shared", rank=2, optimizer=adam)
    strategy.expand(FIRST)
    optimizer_of(strategy).param_groups[0]["lr"] = 0.125
    strategy.expand(SECOND)
    assert [group["lr"] for group in optimizer_of(strategy).param_groups] == [0.125, 0.5, 0.5]


@pytest.mark.parametrize(("kind", "steps"), [(Kept, [3, 6]), (LoRA, [3, 3])])
def test_a_stream_steps_with_one_optimizer_or_with_one_for_each_experience(
    kind: type[LoRA], steps: list[int], backbone: Backbone
) -> None:
    seen: list[int] = []

    class Spied(kind):  # type: ignore[valid-type, misc]
        def after_training(self, data: TrainingData) -> None:
            optimizer: Any = self.optimizers()
            seen.append(int(optimizer.state[self.layers[0].adapter("v").B]["step"]))

    run(Spied(backbone, variant="shared", rank=2))
    assert seen == steps


def test_a_schedule_starts_anew_for_an_optimizer_of_the_stream(backbone: Backbone) -> None:
    rates: list[float] = []

    class Spied(Kept):
        def after_step(self) -> None:
            optimizer: Any = self.optimizers()
            rates.append(optimizer.param_groups[0]["lr"])

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.StepLR:
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    strategy = Spied(backbone, variant="shared", rank=2, optimizer=adam, scheduler=schedule)
    run(strategy, max_epochs=2, batch_size=1000)
    assert rates == [0.5, 0.25] * 2


def test_a_schedule_of_another_length_than_the_training_stops_before_the_first_step(
    backbone: Backbone,
) -> None:
    strategy = LinearProbe(backbone, scheduler=lambda optimizer: QuarterCosine(optimizer, epochs=3))
    with pytest.raises(ValueError, match="an experience is trained for 2"):
        run(strategy, max_epochs=2)


# Hooks, and what is counted


class Recorder(Strategy):
    """Record the weight of the head around one step."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
        self.weights: list[Tensor] = []

    @property
    def weight(self) -> nn.Parameter:
        assert isinstance(self.head, nn.Module)
        return self.head.get_parameter("parts.0.weight")

    def expand(self, experience: Experience) -> None:
        super().expand(experience)
        self.weights.append(self.weight.detach().clone())

    def rectify_gradients(self) -> None:
        assert self.weight.grad is not None
        self.weight.grad.fill_(1.0)

    def after_step(self) -> None:
        self.weights.append(self.weight.clone())


def test_rectified_gradients_are_what_the_optimizer_steps_with(backbone: Backbone) -> None:
    strategy = Recorder(backbone)
    run(strategy, num_classes=2, num_experiences=1, batch_size=1000)
    before, after = strategy.weights
    torch.testing.assert_close(after, before - 1.0)


def test_trainable_parameters_and_stored_bytes_count_adapters_and_heads(backbone: Backbone) -> None:
    strategy = LoRA(backbone, rank=2)
    strategy.expand(FIRST)
    adapters = 2 * 2 * (2 * 32 + 32 * 2)
    head = 3 * 32 + 3
    assert strategy.trainable_parameters == adapters + head
    assert strategy.stored_bytes == 4 * (adapters + head)
    strategy.expand(SECOND)
    assert strategy.trainable_parameters == adapters + 2 * 32 + 2
    assert strategy.stored_bytes == 4 * (adapters + head + 2 * 32 + 2)


class Notes(LinearProbe):
    """Keeps text and numbers outside of tensors."""

    optimizer_scope = "stream"
    notes: ClassVar = {"ones": [1, 1.0], "word": "é", "rows": torch.zeros(8, 2)[:3]}

    def get_extra_state(self) -> dict[str, Any]:
        return dict(self.notes)


def test_stored_bytes_count_extra_state_and_the_optimizer_of_the_stream(backbone: Backbone) -> None:
    strategy = Notes(backbone)
    strategy.expand(FIRST)
    head, text, numbers, storage = 3 * 32 + 3, len("onesword") + len("rows") + 2, 2, 16
    assert strategy.stored_bytes == 4 * head + text + 8 * numbers + 4 * storage
    before = strategy.stored_bytes
    strategy.configure_optimizers()
    strategy.loss(torch.rand(2, 32), torch.tensor([0, 1])).backward()
    assert strategy.kept_optimizer is not None
    strategy.kept_optimizer.step()
    steps = 2  # of weight and bias, a float32 each
    assert strategy.stored_bytes - before == 4 * (2 * head + steps)


def test_a_result_shows_what_is_kept_of_training_images(backbone: Backbone) -> None:
    strategy = LinearProbe(backbone)
    strategy.promises = Promises(training_data="features")
    assert run(strategy).training_data == "features"
