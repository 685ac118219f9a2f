"""The quality of frozen features: ``python -m pretraining.probing digits``.

The features of a backbone are compared with those of the same architecture with random weights, and with raw
pixels. The nearest class mean measures how well the features separate classes as they are, a linear probe how
well a linear layer can separate them. Both see all classes at once.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.data.experience import Batch
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import Prototypes
from cl_bench.run.configuration import layers, resolve

Features = tuple[Tensor, Tensor]
"""Features (N, d) and labels (N,)."""

Accuracies = tuple[float, float]
"""Accuracies of the nearest mean and of the linear probe, in percent."""

_DECAYS = (1e-3, 1e-2, 1e-1)
_ITERATIONS = 50


def nearest_mean_accuracy(train: Features, test: Features) -> float:
    """Return the accuracy in percent of the nearest class mean of ``train`` on ``test``.

    >>> train = torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([0, 0, 1])
    >>> nearest_mean_accuracy(train, (torch.tensor([[2.0], [3.0]]), torch.tensor([0, 0])))
    50.0
    """
    features, labels = train
    classes = int(labels.max()) + 1
    head = Prototypes(features.shape[1], "euclidean")
    head.grow(classes)
    head.write(
        torch.stack([features[labels == label].mean(dim=0) for label in range(classes)]), range(classes)
    )
    return _percent(head(test[0]).argmax(dim=1) == test[1])


def linear_probe_accuracy(train: Features, test: Features) -> float:
    """Return the accuracy in percent of multinomial logistic regression on standardised features.

    Its weight decay is the best of three on every tenth training image, held out for the choice.
    """
    mean, deviation = train[0].mean(dim=0), train[0].std(dim=0).clamp(min=1e-6)
    fitted, tested = ((features - mean) / deviation for features in (train[0], test[0]))
    labels = train[1]
    held = torch.arange(len(labels)) % 10 == 9

    def accuracy_on_held(decay: float) -> float:
        probe = _probe(fitted[~held], labels[~held], decay)
        return _percent(probe(fitted[held]).argmax(dim=1) == labels[held])

    probe = _probe(fitted, labels, max(_DECAYS, key=accuracy_on_held))
    return _percent(probe(tested).argmax(dim=1) == test[1])


def extracted(extract: Callable[[Tensor], Tensor], batches: Iterator[Batch]) -> Features:
    """Return the features and the labels of all images in ``batches``."""
    features, labels = [], []
    with torch.inference_mode():
        for images, of_images in batches:
            features.append(extract(images).flatten(1).float())
            labels.append(of_images)
    return torch.cat(features), torch.cat(labels)


def _probe(features: Tensor, labels: Tensor, decay: float) -> nn.Linear:
    """Return a linear layer fitted to ``features`` (N, d) by L-BFGS, with weight decay ``decay``."""
    probe = nn.Linear(features.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def objective() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(features), labels) + decay / 2 * probe.weight.square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(objective)
    return probe.requires_grad_(False)


def _percent(right: Tensor) -> float:
    return 100 * right.double().mean().item()


def table(
    dataset: str, options: Sequence[str], model: str, seeds: Sequence[int]
) -> dict[str, list[Accuracies]]:
    """Return the accuracies of each kind of features, by name, with one pair for each seed that matters.

    Args:
        dataset: Config stem of a dataset.
        options: Options of ``cl-bench run``.
        model: Name of a backbone that has weights.
        seeds: Seeds of the random weights, and of the data if they are generated.
    """
    trained = Backbone(model).eval()
    options = [*options, "--num_experiences=1", f"--data.image_size={trained.image_size}"]
    drawn = (
        "data_seed" in inspect.signature(resolve(layers("ncm", dataset), options).datamodule_class).parameters
    )
    found: dict[str, list[Accuracies]] = {}
    for seed in seeds:
        seeded = [*options, f"--data.data_seed={seed}"] if drawn else options
        data = resolve(layers("ncm", dataset), seeded).datamodule
        data.setup()
        data.enter(data.experiences[0])
        extractors: dict[str, Callable[[Tensor], Tensor]] = {
            "random weights": Backbone(model, weights="random", seed=seed).eval()
        }
        if drawn or not found:
            extractors |= {model: trained, "raw pixels": nn.Identity()}
        for name, extract in extractors.items():
            train, test = (
                extracted(extract, iter(loader))
                for loader in (data.plain_dataloader(), data.test_dataloader())
            )
            accuracies = nearest_mean_accuracy(train, test), linear_probe_accuracy(train, test)
            found.setdefault(name, []).append(accuracies)
    return found


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m pretraining.probing", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("dataset", help="config stem, such as digits; options of `cl-bench run` may follow")
    parser.add_argument("--backbone", default="embedded", help="a backbone with weights (%(default)s)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of random weights and data"
    )
    arguments, options = parser.parse_known_args()
    print(f"| {arguments.dataset} | NCM | linear probe |\n| --- | ---: | ---: |")
    for name, pairs in table(arguments.dataset, options, arguments.backbone, arguments.seeds).items():
        print(f"| {name} | {' | '.join(_cell(accuracies) for accuracies in zip(*pairs, strict=True))} |")


def _cell(accuracies: Sequence[float]) -> str:
    """Return mean and sample standard deviation, or a single number."""
    mean = f"{np.mean(accuracies):.2f}"
    return mean if len(accuracies) == 1 else f"{mean} ± {np.std(accuracies, ddof=1):.2f}"


if __name__ == "__main__":
    main()
