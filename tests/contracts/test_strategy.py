import copy

import pytest
import torch
from torch import Tensor

from cl_bench.contracts.strategy import Strategy
from cl_bench.data.experience import Experience
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.maths.schedules import QuarterCosine
from cl_bench.network.backbones import Backbone
from datamodules.toy import Toy
from strategies.linear_probe import LinearProbe
from strategies.lora import LoRA
from strategies.ncm import NearestClassMean

FIRST, SECOND = Experience(0, 2, range(3)), Experience(1, 2, range(3, 5))


@pytest.fixture
def backbone() -> Backbone:
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return Backbone("vision_transformer", "random", options)


def test_the_head_grows_with_the_classes_seen(backbone: Backbone) -> None:
    strategy = LinearProbe(backbone)
    images = torch.rand(4, 3, 8, 8)
    for experience in (FIRST, SECOND):
        strategy.expand(experience)
        assert strategy(images).shape == (4, experience.num_classes_seen)


def test_only_the_current_head_learns_from_the_default_loss(backbone: Backbone) -> None:
    strategy = LinearProbe(backbone)
    strategy.expand(FIRST)
    strategy.expand(SECOND)
    strategy.loss(torch.rand(6, backbone.feature_dim), torch.tensor([3, 4] * 3)).backward()
    with_gradient = {name for name, p in strategy.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == {"head.parts.1.weight", "head.parts.1.bias"}


def test_asking_for_the_experience_before_there_is_one_is_refused(backbone: Backbone) -> None:
    with pytest.raises(RuntimeError, match="call expand"):
        _ = LinearProbe(backbone).experience


def test_the_head_is_a_parameter_group_with_its_own_learning_rate(backbone: Backbone) -> None:
    strategy = LoRA(backbone, rank=2, head_lr=0.25, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    strategy.expand(FIRST)
    optimizer = strategy.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in strategy.parameters() if p.requires_grad}
    assert len(trained) == len({id(p) for p in trained})


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


class Recorder(Strategy):
    """Write down what happens around one optimiser step."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
        self.gradients: list[Tensor] = []
        self.moved: list[Tensor] = []

    def rectify_gradients(self) -> None:
        weight = self.head.get_parameter("parts.0.weight")
        assert weight.grad is not None
        weight.grad.fill_(1.0)

    def after_step(self) -> None:
        self.moved.append(self.head.get_parameter("parts.0.weight").clone())


def test_rectified_gradients_are_what_the_optimiser_steps_with(backbone: Backbone) -> None:
    from cl_bench.loop.trainer import StreamTrainer
    from datamodules.toy import Toy

    strategy = Recorder(backbone)
    before: list[Tensor] = []
    expand = strategy.expand

    def expand_and_keep(experience: Experience) -> None:
        expand(experience)
        before.append(copy.deepcopy(strategy.head.get_parameter("parts.0.weight").detach()))

    strategy.expand = expand_and_keep  # type: ignore[method-assign]
    datamodule = Toy(num_classes=2, num_experiences=1, image_size=8, batch_size=1000)
    StreamTrainer(max_epochs=1, accelerator="cpu").run(strategy, datamodule)
    torch.testing.assert_close(strategy.moved[0], before[0] - 1.0)


class FewImages:
    """Two images of each of three classes, as training data."""

    def __init__(self) -> None:
        images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.batch = images, torch.tensor([0, 1, 2, 0, 1, 2])

    def augmented(self) -> list[tuple[Tensor, Tensor]]:
        return [self.batch]

    def plain(self) -> list[tuple[Tensor, Tensor]]:
        return [self.batch]


def test_a_head_starts_at_random_or_from_class_means(backbone: Backbone) -> None:
    data = FewImages()
    for start in ("random", "means"):
        strategy = LinearProbe(backbone, head_start=start)
        strategy.expand(FIRST)
        drawn = copy.deepcopy(strategy.head.state_dict())
        strategy.start_head(data)
        kept = all(torch.equal(value, drawn[name]) for name, value in strategy.head.state_dict().items())
        assert kept is (start == "random")
    features = strategy.features(data.batch[0])
    means = torch.stack([features[label::3].mean(dim=0) for label in range(3)])
    length = means.norm(dim=1).square().mean().sqrt()
    cosines = torch.nn.functional.cosine_similarity(features[:, None], means[None], dim=2)
    expected = 30 * cosines * features.norm(dim=1, keepdim=True) / length
    torch.testing.assert_close(strategy.head(features), expected, atol=1e-4, rtol=1e-5)


def test_a_head_of_prototypes_needs_no_start(backbone: Backbone) -> None:
    strategy = NearestClassMean(backbone, head_start="means")
    strategy.expand(FIRST)
    strategy.start_head(FewImages())
    assert not strategy.head.means.any()


def test_a_schedule_of_another_length_than_the_training_stops_before_the_first_step(
    backbone: Backbone,
) -> None:
    strategy = LinearProbe(backbone, scheduler=lambda optimizer: QuarterCosine(optimizer, epochs=3))
    stream = Toy(num_classes=2, num_experiences=1, image_size=8)
    with pytest.raises(ValueError, match="an experience is trained for 2"):
        StreamTrainer(max_epochs=2, accelerator="cpu").run(strategy, stream)
