import io
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from cl_bench.results.result import Protocol, Result, Row, read
from cl_bench.run.configuration import layers, resolve
from cl_bench.run.console import RunConsole, chance, closing_lines, opening_lines
from cl_bench.run.run import RunFailed, finished, quiet, run


class Interrupted(Callback):
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise ArithmeticError


def test_a_resumed_run_prints_its_checkpoint_and_what_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = resolve(
        layers("lora", "toy"), [f"--results={tmp_path}", "--trainer.accelerator=cpu", "--max_epochs=1"]
    )
    with quiet(), pytest.raises(RunFailed):
        run(configuration, [Interrupted()])
    output = io.StringIO()
    monkeypatch.setattr(torch, "__version__", "1.0")
    with quiet():
        run(configuration, [RunConsole(Console(file=output, width=200))])
    line, warning, *_ = output.getvalue().splitlines()
    assert line == "resumes from a checkpoint: experience 1, testing"
    assert warning.startswith("warning: the result may differ in bits from a run in one go: torch ")
    assert warning.endswith(" then and 1.0 now")
    assert output.getvalue().count("resumes from") == 1


def test_a_resumed_run_names_the_damaged_checkpoints(tmp_path: Path) -> None:
    configuration = resolve(
        layers("lora", "toy"), [f"--results={tmp_path}", "--trainer.accelerator=cpu", "--max_epochs=1"]
    )
    with quiet(), pytest.raises(RunFailed):
        run(configuration, [Interrupted()])
    last = configuration.checkpoints.last
    assert last is not None
    last.write_bytes(last.read_bytes()[:1000])
    output = io.StringIO()
    with quiet():
        run(configuration, [RunConsole(Console(file=output, width=200))])
    line = output.getvalue().splitlines()[0]
    assert line == f"resumes from experience 1, merging, because these checkpoints are damaged: {last.name}"


def test_a_terminal_shows_a_bar_and_one_line_for_each_experience(tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    configuration = resolve(
        layers("lora", "toy"), [f"--results={tmp_path}", "--trainer.accelerator=cpu", "--max_epochs=2"]
    )
    with quiet():
        result = run(configuration, [RunConsole(console)])
    text = output.getvalue()
    assert "epoch 2/2" in text
    assert text.count("accuracy over") == 3
    assert opening_lines(configuration).startswith("LoRA on toy-T3")
    assert closing_lines(result, configuration.folder).startswith("LoRA (merge): ")
    path = finished(configuration)
    assert path is not None
    assert read(path) == result
    assert str(path) in closing_lines(result, configuration.folder)


def test_the_first_line_contains_the_printed_name_of_the_method(tmp_path: Path) -> None:
    opening = [
        opening_lines(resolve(layers(name, "toy"), [f"--results={tmp_path}"])).partition(" on toy")[0]
        for name in ("janus_lora", "ncm", "joint")
    ]
    assert opening == ["JANUS-LoRA", "NCM", "LoRA (joint)"]


def ended(correct: list[int], images: list[int], **model: object) -> Result:
    return Result(
        strategy="LoRA (merge)",
        dataset="digits",
        experiences=[(0, len(images))],
        class_names=[str(position) for position in range(len(images))],
        test_images=images,
        order="identity",
        seed=1,
        regime="sequential",
        protocol=Protocol({}, {}, {}),
        config={"model": {"init_args": model}},
        rows=[Row(correct, correct, images)],
    )


@pytest.mark.parametrize(
    ("correct", "above"),
    # With 100 fair guesses among ten classes, P(X >= 18) = 0.0100 and P(X >= 19) = 0.0046 (a binomial table).
    [(0, False), (10, False), (18, False), (19, True), (100, True)],
)
def test_the_bound_of_chance_is_that_of_a_binomial_table(correct: int, above: bool) -> None:
    spread = [correct // 10 + (place < correct % 10) for place in range(10)]
    assert (chance(ended(spread, [10] * 10)) is None) is above


def test_chance_is_to_answer_with_the_largest_class() -> None:
    assert chance(ended([80, 0, 0], [80, 10, 10])) is not None
    assert chance(ended([80, 10, 5], [80, 10, 10])) is None


def test_a_run_at_chance_names_the_likely_remedy() -> None:
    images = [30, 30, 30, 30]
    started_at_random = chance(ended([0, 0, 0, 30], images, head_start="random"))
    assert started_at_random == (
        "warning: 30 of 120 images are correct, which is not above chance (25.0 %): "
        "start the heads from class means with --head_start means"
    )
    from_means = chance(ended([0, 0, 0, 30], images, head_start="means"))
    assert from_means is not None
    assert from_means.endswith("try another --optimizer.lr and more --max_epochs, and compare with ncm")


def test_only_a_run_at_chance_ends_with_a_warning(tmp_path: Path) -> None:
    options = [f"--results={tmp_path}", "--trainer.accelerator=cpu"]
    with quiet():
        lucky = run(resolve(layers("ncm", "toy"), options))
        random_heads = resolve(
            layers("lora", "toy"), [*options, "--head_start=random", "--optimizer.lr=0.0005"]
        )
        unlucky = run(random_heads)
    assert "warning" not in closing_lines(lucky, tmp_path)
    assert closing_lines(unlucky, tmp_path).splitlines()[1].startswith("warning: ")


def test_an_experience_of_one_class_is_refused_before_training(tmp_path: Path) -> None:
    options = ["--num_experiences=6", f"--results={tmp_path}", "--trainer.accelerator=cpu"]
    for name in ("lora", "linear_probe", "janus_lora"):
        with quiet(), pytest.raises(ValueError, match="Experience 1 brings a single class, and "):
            run(resolve(layers(name, "toy"), options))
    with quiet():  # neither compares the classes of one experience
        assert [run(resolve(layers(name, "toy"), options)).status for name in ("ncm", "joint")] == [
            "done"
        ] * 2
