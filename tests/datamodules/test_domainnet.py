from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cl_bench.data.published import domainnet
from cl_bench.loop.trainer import StreamTrainer
from cl_bench.network.backbones import Backbone
from cl_bench.results.result import FILE_NAME, read
from datamodules.domainnet import DomainNet
from strategies.ncm import NearestClassMean


def domain_net(root: Path, **arguments: Any) -> DomainNet:
    usual: dict[str, Any] = {"root": str(root), "num_experiences": 5, "image_size": 8}
    data = DomainNet(**usual | arguments)
    data.setup()
    return data


def test_five_experiences_of_69_classes_are_dealt(domainnet_root: Path) -> None:
    data = domain_net(domainnet_root, order="numpy:1993")
    assert [len(experience.classes) for experience in data.experiences] == [69] * 5
    assert data.stream.order[:8] == (214, 80, 343, 268, 224, 97, 253, 55)
    assert sorted(np.concatenate(data.stream.train_indices)) == list(range(6 * 345 - 1))


def test_ten_experiences_are_refused(domainnet_root: Path) -> None:
    with pytest.raises(
        ValueError, match="345 classes cannot be dealt evenly into 10 experiences, 5 would remain"
    ):
        domain_net(domainnet_root, num_experiences=10)


def test_labels_follow_the_official_numbering(domainnet_root: Path) -> None:
    assert domain_net(domainnet_root).class_names == domainnet.names()


def test_images_are_counted_by_domain(domainnet_root: Path) -> None:
    data = domain_net(domainnet_root, order="numpy:1993")
    counts = np.array(data.domain_images)
    assert data.domains == list(domainnet.DOMAINS)
    assert counts.sum(axis=1).tolist() == [345, 345, 344, 345, 690, 345]
    assert counts.sum(axis=0).tolist() == data.test_images
    painting, without = data.domains.index("painting"), data.class_names.index(domainnet.names()[327])
    assert (counts[painting] == 0).nonzero()[0].tolist() == [without]


def test_a_test_batch_carries_domains_and_a_training_batch_does_not(domainnet_root: Path) -> None:
    data = domain_net(domainnet_root)
    data.enter(data.experiences[0])
    counts = np.zeros((6, 69), dtype=int)
    for images, labels, domains in data.test_dataloader():
        assert len(images) == len(labels) == len(domains)
        np.add.at(counts, (domains.numpy(), labels.numpy()), 1)
    assert counts.tolist() == np.array(data.domain_images)[:, :69].tolist()
    assert len(next(iter(data.train_dataloader()))) == 2


def test_without_quickdraw_is_another_protocol(domainnet_root: Path) -> None:
    data = domain_net(domainnet_root, variant="no_quickdraw")
    assert data.domains == ["clipart", "infograph", "painting", "real", "sketch"]
    assert sum(data.test_images) == 345 * 6 - 1
    assert data.protocol()["train_images"] != domain_net(domainnet_root).protocol()["train_images"]


def test_validation_images_keep_their_domain(domainnet_root: Path) -> None:
    data = domain_net(domainnet_root, val_fraction=0.2)
    counts = np.array(data.domain_images)
    assert counts.sum(axis=0).tolist() == data.test_images == [1] * 345
    assert (counts.sum(axis=1) > 0).all()


def test_a_result_counts_each_domain_separately(domainnet_root: Path, tmp_path: Path) -> None:
    tiny = dict(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=1)
    backbone = Backbone("vision_transformer", weights="random", options=tiny)
    StreamTrainer(max_epochs=1, accelerator="cpu").run(
        NearestClassMean(backbone), domain_net(domainnet_root, batch_size=256), folder=tmp_path
    )
    result = read(tmp_path / FILE_NAME)
    assert result.domains == list(domainnet.DOMAINS)
    assert np.array(result.domain_images).sum(axis=0).tolist() == result.test_images
    for row in result.rows:
        assert row is not None
        by_domain = np.array(row.correct_by_domain)
        assert by_domain.sum(axis=0).tolist() == row.correct
        assert (by_domain <= np.array(result.domain_images)[:, : len(row.correct)]).all()


def test_a_missing_image_is_named(domainnet_root: Path, tmp_path: Path) -> None:
    for path in domainnet_root.glob("*.txt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"images are missing .* cl-bench prepare domainnet"):
        domain_net(tmp_path)
