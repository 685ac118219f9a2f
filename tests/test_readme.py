import contextlib
import io
import re
from pathlib import Path

import pytest

from cl_bench.run.configs import stems_of
from cl_bench.run.configuration import layers, resolve


@pytest.fixture(scope="module")
def readme(checkout: Path) -> str:
    return (checkout / "README.md").read_text(encoding="utf-8")


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", readme, flags=re.DOTALL)


@pytest.mark.parametrize("kind", ("strategies", "datamodules"))
def test_every_method_and_dataset_is_in_its_table(readme: str, kind: str) -> None:
    for stem in stems_of(kind):
        assert f"`{stem}`" in readme, stem


def test_links_lead_to_files(readme: str, checkout: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", readme) if "://" not in link]
    assert links
    assert not [link for link in links if not (checkout / link).exists()]


def test_options_of_one_run_deal_a_stream_of_its_dataset(readme: str) -> None:
    section = readme.partition("## One run")[2].partition("\n## ")[0]
    ((strategy, dataset),) = re.findall(r"cl-bench run (\w+) (\w+) --seed", section)
    (words,) = re.findall(r"`(--held_out_classes [^`]*)`", section)
    data = resolve(layers(strategy, dataset), words.split()).datamodule
    data.setup()
    assert len(data.class_names) == 8


def test_the_python_example_runs(readme: str) -> None:
    (example,) = [block for block in blocks(readme, "python") if "StreamTrainer" in block]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example, {})
    assert 0 <= float(printed.getvalue()) <= 100
