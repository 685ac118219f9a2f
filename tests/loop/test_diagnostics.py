import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from cl_bench.check.subject import copied_state
from cl_bench.contracts.strategy import Strategy
from cl_bench.loop.diagnostics import POINTS, Diagnostics, scalars
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.maths.losses import danger_score
from cl_bench.measure.means import class_means
from cl_bench.network.backbones import Backbone
from cl_bench.results.result import Result
from datamodules.toy import Toy
from strategies.janus_lora import JanusLoRA
from strategies.keeplora import KeepLoRA
from strategies.linear_probe import LinearProbe
from strategies.loda import LoDA
from strategies.lora import LoRA
from strategies.lora_gpm import LoRAGPM
from strategies.ncm import NearestClassMean

Making = Callable[..., Backbone]


def toy(**changes: Any) -> Toy:
    arguments = {"num_classes": 6, "num_experiences": 3, "image_size": 8, "seed": 1, "batch_size": 16}
    return Toy(**arguments | changes)


class Losses(Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))


def run(strategy: Strategy, stream: Toy, *callbacks: Callback) -> Result:
    return StreamTrainer(max_epochs=2, accelerator="cpu", callbacks=list(callbacks)).run(strategy, stream)


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def plain(stream: Toy, index: int) -> tuple[Tensor, Tensor]:
    stream.enter(stream.experiences[index])
    batches = list(stream.plain_dataloader())
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


@pytest.mark.parametrize(
    "method",
    (
        lambda backbone: JanusLoRA(backbone, rank=2, optimizer=optimizer),
        lambda backbone: LoRA(backbone, variant="shared", rank=2, optimizer=optimizer),
    ),
)
def test_counts_losses_and_state_are_the_same_with_and_without_diagnostics(
    method: Any, backbone: Making
) -> None:
    kept = []
    for watchers in ((), (Diagnostics(),)):
        losses, strategy = Losses(), method(backbone())
        result = run(strategy, toy(num_classes=8, held_out_classes=2), losses, *watchers)
        assert len(result.diagnostics) == (3 if watchers else 0)
        kept.append((result.rows, losses.losses, copied_state(strategy)))
    without, watched = kept
    assert without[:2] == watched[:2]
    assert all(torch.equal(without[2][name], watched[2][name]) for name in without[2])


class Inputs(Callback):
    """Keeps the weights of a layer after every experience, and its inputs from the images of the first."""

    def __init__(self, stream: Toy) -> None:
        self.images = plain(stream, 0)[0]
        self.weights: list[Tensor] = []
        self.inputs: list[Tensor] = []

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LoRA)
        layer = pl_module.layers[1]
        self.weights.append(layer.effective_weight().detach().double())
        if len(self.weights) == 1:
            hook = layer.register_forward_pre_hook(lambda _, found: self.inputs.append(found[0].detach()))
            pl_module.backbone(self.images)
            hook.remove()


def test_the_violation_is_the_norm_of_what_the_update_does_to_past_inputs(backbone: Making) -> None:
    stream = toy(num_experiences=2)
    stream.setup()
    watcher = Inputs(stream)
    result = run(LoRA(backbone(), rank=2, optimizer=optimizer), stream, Diagnostics(), watcher)
    assert result.diagnostics[0]["violation"] == {}
    update = (watcher.weights[1] - watcher.weights[0])[64:]  # the rows of the values
    tokens = watcher.inputs[0].flatten(0, 1).double()
    moved = torch.linalg.matrix_norm(update @ tokens.T).item()
    found = result.diagnostics[1]["violation"]["v"][1]
    assert found["absolute"] == pytest.approx(moved, rel=1e-6)
    most = torch.linalg.matrix_norm(update).item() * torch.linalg.matrix_norm(tokens).item()
    assert found["relative"] == pytest.approx(moved / most, rel=1e-6)
    assert moved > 0.1


def test_an_update_outside_99_percent_of_the_energy_violates_at_most_the_rest(backbone: Making) -> None:
    relative = {}
    for name, strategy in (
        ("plain", LoRA(backbone(), rank=2, optimizer=optimizer)),
        ("safe", LoRAGPM(backbone(), rank=2, row_space="safe", threshold=0.99, optimizer=optimizer)),
    ):
        found = run(strategy, toy(num_experiences=2), Diagnostics()).diagnostics[1]["violation"]
        relative[name] = [one["relative"] for target in ("k", "v") for one in found[target]]
    assert max(relative["safe"]) <= math.sqrt(1 - 0.99)
    assert min(relative["plain"]) > max(relative["safe"])


def test_angles_are_those_of_features_to_prototypes(backbone: Making) -> None:
    stream, probe = toy(num_experiences=2), LinearProbe(backbone())
    result = run(probe, stream, Diagnostics())
    first, second = result.diagnostics
    assert first["danger_score"] is None
    assert first["angular"] is None
    with torch.no_grad():
        old = class_means(probe.backbone, [plain(stream, 0)], range(0, 3))
        images, labels = plain(stream, 1)
        own = class_means(probe.backbone, [(images, labels)], range(3, 6))
        features = probe.backbone(images)
    assert second["danger_score"] == pytest.approx(danger_score(features, old).item(), abs=1e-5)
    expected = torch.cosine_similarity(features, own[labels - 3])
    assert second["angular"]["own_centre"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert sum(second["angular"]["nearest_old"]) / 36 == pytest.approx(second["danger_score"], abs=1e-5)


def test_at_most_256_images_are_kept_for_the_scatter(backbone: Making) -> None:
    stream = toy(num_classes=2, num_experiences=2, images_per_class=300)
    found = run(NearestClassMean(backbone()), stream, Diagnostics()).diagnostics[1]["angular"]
    assert POINTS / 2 < len(found["nearest_old"]) == len(found["own_centre"]) <= POINTS


def test_held_out_accuracy_is_that_of_nearest_centroids_and_stays_if_frozen(backbone: Making) -> None:
    stream, probe = toy(num_classes=10, noise=0.8, held_out_classes=4), LinearProbe(backbone())
    found = [entry["held_out_ncm"] for entry in run(probe, stream, Diagnostics()).diagnostics]
    loaders = stream.held_out_dataloaders()
    assert loaders is not None
    with torch.no_grad():
        (train, train_labels), (test, test_labels) = (
            (torch.cat([probe.backbone(x) for x, _ in loader]), torch.cat([y for _, y in loader]))
            for loader in loaders
        )
    centroids = NearestCentroid().fit(train.numpy(), train_labels.numpy())
    accuracy = centroids.score(test.numpy(), test_labels.numpy())
    assert 0 < accuracy < 1
    assert found == [{"before": accuracy, "after": accuracy}] * 3


def test_held_out_accuracy_changes_with_the_backbone_and_starts_where_it_ended(backbone: Making) -> None:
    strategy = LoRA(backbone(), optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.1))
    stream = toy(num_classes=10, noise=0.8, test_images_per_class=30, held_out_classes=4)
    found = [entry["held_out_ncm"] for entry in run(strategy, stream, Diagnostics()).diagnostics]
    assert [entry["before"] for entry in found[1:]] == [entry["after"] for entry in found[:-1]]
    assert len({entry["after"] for entry in found}) > 1


@pytest.mark.parametrize(
    ("method", "targets", "memories"),
    (
        (lambda backbone: LoRA(backbone, rank=2), ["k", "v"], None),
        (lambda backbone: LoRA(backbone, rank=2, targets=("q", "fc1", "fc2")), ["q", "fc1", "fc2"], None),
        (lambda backbone: LoDA(backbone, rank=2), ["q", "k", "v"], None),
        (lambda backbone: KeepLoRA(backbone, rank=2), ["q", "k", "v", "proj"], 8),
        (NearestClassMean, [], None),
    ),
)
def test_projections_have_the_same_names_whatever_the_adapters_are_called(
    method: Any, targets: list[str], memories: int | None, backbone: Making
) -> None:
    last = run(method(backbone()), toy(), Diagnostics()).diagnostics[-1]
    assert list(last["violation"]) == targets
    assert all(len(by_layer) == 2 for by_layer in last["violation"].values())
    assert (last["basis_dims"] and len(last["basis_dims"])) == memories


def test_means_go_to_the_loggers() -> None:
    entry = {
        "basis_dims": None,
        "violation": {"k": [{"absolute": 1.0, "relative": 0.5}, {"absolute": 3.0, "relative": 0.1}]},
        "danger_score": 0.25,
        "angular": None,
        "held_out_ncm": None,
    }
    assert scalars(entry) == {
        "diagnostics/violation/k/absolute": 2.0,
        "diagnostics/violation/k/relative": pytest.approx(0.3),
        "diagnostics/danger_score": 0.25,
    }
