from functools import partial
from pathlib import Path

import pytest

from cl_bench.__main__ import main
from cl_bench.check import command
from cl_bench.check.command import CLAIMS, verdicts

START, FROZEN = list(CLAIMS)[1:3]
WRONG = Path(__file__).with_name("wrong_strategies.py")

ONE_AND_A_HALF = '''
from cl_bench.contracts.strategy import Strategy


class Mine(Strategy):
    """A linear probe.

    Args:
        backbone: Pre-trained vision transformer.
        kwargs: Settings of every strategy.
    """

    def __init__(self, backbone, **kwargs):
        super().__init__(backbone, **kwargs)


class Unbuildable(Mine):
    """Needs a block that does not exist."""

    def __init__(self, backbone, **kwargs):
        super().__init__(backbone, **kwargs)
        self.deepest = backbone.blocks[11]
'''


@pytest.fixture
def few_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check only the claims whose verdicts the test reads."""
    monkeypatch.setattr(command, "verdicts", partial(verdicts, claims=(START, FROZEN)))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / f"{tmp_path.name}.py"  # a unique name: modules of one name are imported once
    path.write_text(ONE_AND_A_HALF)
    return path


def test_a_line_for_each_claim_is_printed_and_the_status_is_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "strategies.linear_probe.LinearProbe", "--head_lr", "0.1"]) == 0
    title, *lines, last = capsys.readouterr().out.splitlines()
    assert title.startswith("LinearProbe")
    assert [line.partition(": ")[0] for line in lines] == [f"passed  {claim}" for claim in CLAIMS]
    assert last.startswith("all claims hold")


@pytest.mark.usefixtures("few_claims")
def test_a_broken_claim_makes_the_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{WRONG}:ZeroesAGradient"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED  frozen parts stay frozen: under a weight decay, the steps of experience 1 move" in printed
    assert "1 claim failed" in printed


@pytest.mark.usefixtures("few_claims")
def test_a_file_or_a_config_next_to_it_is_checked(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = file.with_suffix(".yaml")
    config.write_text(f"model: {{class_path: {file.stem}.Mine}}")
    for name in (f"{file}:Mine", str(config)):
        assert main(["check", name]) == 0
        assert capsys.readouterr().out.startswith("Mine")


def test_a_strategy_that_cannot_be_built_is_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{file}:Unbuildable"]) == 2
    error = capsys.readouterr().err
    assert "Unbuildable cannot be built for a transformer of two blocks of width 32" in error
    assert "list index out of range" in error


@pytest.mark.parametrize(
    ("words", "error"),
    (
        ([], "Name one strategy"),
        (["lorra"], "Did you mean lora?"),
        (["strategies.lora.LoRa"], "Did you mean strategies.lora.LoRA?"),
        (["missing.py"], "There is no file missing.py"),
        ([str(WRONG)], f"name one, as {WRONG}:Class"),
        ([__file__], "defines no subclass of Strategy"),
        ([f"{WRONG}:Jump"], "Did you mean Jumps?"),
        (["lora", "--rnak", "2"], "There is no key rnak. Did you mean model.rank?"),
    ),
)
def test_a_mistake_is_reported_in_one_sentence(
    words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *words]) == 2
    assert error in capsys.readouterr().err


def test_help_names_the_strategies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--help"]) == 0
    assert "linear_probe" in capsys.readouterr().out
