"""The protocol of a run in words, without training: everything that comparable runs have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cl_bench.contracts.datamodule import StreamDataModule
from cl_bench.contracts.photographs import PhotographFiles, Photographs
from cl_bench.data.published import domainnet
from cl_bench.errors import refusing
from cl_bench.results.result import Protocol
from cl_bench.run.configuration import Configuration

_WIDTH = 20  # of the first column


def in_words(configuration: Configuration) -> str:
    """Return the protocol of a run; data and weights are read, but nothing is trained.

    Raises:
        ValueError: If data, backbone or settings cannot be used.
        OSError: If data or weights are missing.
    """
    with refusing():
        data = configuration.datamodule
        data.setup("fit")  # first: if the data are missing, no weights are downloaded
        strategy, trainer = configuration.build([], [])
        trainer.require_fit(strategy, data)
        protocol = trainer.protocol(strategy, data)
    sizes = protocol.identity["experience_sizes"]
    lines = [
        ("protocol", protocol.fingerprint),
        *_identity(protocol.identity, sum(data.test_images)),
        ("experiences", f"{len(sizes)}, of {_counted(sizes)} classes"),
        ("class order", f"{data.order_name}; a factor: results of several orders are averaged"),
        ("seed", f"{data.seed}; a factor: results of several seeds are averaged"),
        *_provenance(data),
    ]
    text = [f"{name:<{_WIDTH}}{value}" for name, value in lines]
    return "\n".join([*text, *_remarks(configuration, protocol)])


def _identity(identity: Mapping[str, Any], evaluated: int) -> list[tuple[str, str]]:
    backbone = identity["backbone"]
    held_out = (
        f"{evaluated:,} images held out of training, {identity['val_fraction']:.0%} of each class; "
        "the test images are not used"
        if identity["evaluated_on"] == "validation"
        else f"the {evaluated:,} test images, once after each experience"
    )
    return [
        ("dataset", f"{identity['dataset']}, {len(identity['class_names'])} classes"),
        *((name.replace("_", " "), value) for name, value in identity["variants"].items()),
        ("training images", f"list {identity['train_images'][:16]}"),
        ("evaluated on", f"{held_out}; list {identity['test_images'][:16]}"),
        ("decoding", identity["decoding"]),
        ("image size", f"{identity['image_size']} pixels"),
        ("training view", _one_line(identity["train_transform"])),
        ("test view", _one_line(identity["test_transform"])),
        ("normalisation", f"{backbone['normalisation']}, in the backbone"),
        ("backbone", f"{backbone['model']}, {backbone['weights']} weights {backbone['weights_sha256'][:16]}"),
        ("precision", identity["precision"]),
    ]


def _provenance(data: StreamDataModule) -> list[tuple[str, str]]:
    """Return the checksum of the image files; the protocol holds only their list."""
    if not isinstance(data, PhotographFiles):
        return []
    found = data.images_sha256
    bytes_ = "cl-bench prepare has not scanned their bytes" if found is None else f"bytes {found[:16]}"
    return [("image files", f"{bytes_}; shown with a result, not part of the protocol")]


def _remarks(configuration: Configuration, protocol: Protocol) -> list[str]:
    """Return what readers of the results must know in addition to the settings."""
    remarks = []
    data = configuration.datamodule
    used = protocol.identity["backbone"]["normalisation"]
    if isinstance(data, Photographs) and used != data.published_normalisation:
        remarks.append(
            f"The transforms {data.transforms} were published with the normalisation "
            f"{data.published_normalisation}, and this run uses {used}."
        )
    if data.name == "domainnet":
        remarks.append(domainnet.UNSAID)
    return remarks


def _counted(sizes: list[int]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else ", ".join(map(str, sizes))


def _one_line(text: str) -> str:
    return " ".join(text.split())
