from __future__ import annotations

from pathlib import Path

import pytest

from cl_bench.__main__ import main
from cl_bench.contracts.photographs import Photographs
from cl_bench.data.published import domainnet
from cl_bench.results.result import FILE_NAME, read
from cl_bench.run.configuration import layers, resolve
from cl_bench.run.protocol import in_words
from datamodules.toy import Toy


def test_the_printed_protocol_has_the_fingerprint_of_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "ncm", "toy", "--results", str(tmp_path), "--trainer.accelerator", "cpu"]
    assert main([*words, "--print_protocol"]) == 0
    printed = capsys.readouterr().out
    assert not list(tmp_path.rglob(FILE_NAME))
    assert main(words) == 0
    (path,) = tmp_path.rglob(FILE_NAME)
    assert f"protocol            {read(path).protocol.fingerprint}\n" in printed
    assert "evaluated on        the 36 test images, once after each experience" in printed


def test_the_printed_protocol_contains_every_part_of_the_identity() -> None:
    configuration = resolve(layers("ncm", "toy"), ["--val_fraction", "0.25", "--trainer.accelerator", "cpu"])
    printed = in_words(configuration)
    assert "18 images held out of training, 25% of each class; the test images are not used" in printed
    data = configuration.datamodule
    named = {key: value for key, value in data.protocol().items() if key != "evaluated_on"}
    for value in named.values():
        if isinstance(value, str):
            assert " ".join(value.split())[:16] in printed


class Renditions(Toy, Photographs):
    """Toy data with the name and the presets of a benchmark."""

    name = "domainnet"


def test_the_printed_protocol_ends_with_remarks_for_the_reader(tmp_path: Path) -> None:
    config = tmp_path / "renditions.yaml"
    config.write_text(
        f"data: {{class_path: {__name__}.Renditions, init_args: {{transforms: clip, num_experiences: 2}}}}\n"
        "backbone: {model: vision_transformer, weights: random, normalisation: unit, options: "
        "{img_size: 16, patch_size: 8, embed_dim: 32, depth: 1, num_heads: 1}}\n"
    )
    printed = in_words(resolve(layers("ncm", str(config)), ["--trainer.accelerator", "cpu"]))
    assert "transforms          clip\n" in printed
    remark = "The transforms clip were published with the normalisation clip, and this run uses unit."
    assert remark in printed
    assert printed.endswith(domainnet.UNSAID)
