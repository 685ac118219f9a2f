from pathlib import Path

import pytest

from cl_bench.check.claims import CLAIMS, verdicts
from cl_bench.check.command import layer
from cl_bench.check.subject import Subject, Verdict
from cl_bench.run.configuration import CONFIGS
from cl_bench.run.run import quiet

WRONG = Path(__file__).with_name("wrong_strategies.py")

START, FROZEN, HEADS, MERGE, OPTIMIZER, TASK, DATA, SEED, CHECKPOINT, MEMORY, PRECISION, STEP = CLAIMS


def checked(name: str | Path, *overrides: str) -> dict[str, Verdict]:
    with quiet():
        found = verdicts(Subject(layer(name) if isinstance(name, str) else name, overrides))
        return {verdict.claim: verdict for verdict in found}


def failed(found: dict[str, Verdict]) -> dict[str, str]:
    return {claim: verdict.why for claim, verdict in found.items() if not verdict.passed}


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("strategies/*.yaml")), ids=lambda path: path.stem)
def test_every_strategy_keeps_its_contract(config: Path) -> None:
    found = checked(config)
    assert list(found) == list(CLAIMS)
    assert failed(found) == {}


@pytest.mark.soak
@pytest.mark.parametrize(
    ("stem", "overrides"),
    (
        ("janus_lora", ("--row_space=free",)),
        ("janus_lora", ("--online_estimation=stream",)),
        ("janus_lora", ("--online_estimation=null", "--rectification=false", "--decoupled_margin=false")),
        ("lora_gpm", ("--decoupled_margin=true", "--row_space=safe")),
        ("inflora", ("--energy=features", "--memory_form=plain")),
        ("keeplora", ("--principal=output", "--input_statistic=batch_average", "--head_start=random")),
        ("loda", ("--gradient_alignment=false", "--recalibration=none")),
        ("loda", ("--recalibration=full", "--count_merged=false")),
        ("lora", ("--variant=shared", "--head_start=means")),
    ),
)
def test_every_option_keeps_the_contract(stem: str, overrides: tuple[str, ...]) -> None:
    assert failed(checked(CONFIGS / "strategies" / f"{stem}.yaml", *overrides)) == {}


@pytest.mark.parametrize(
    ("strategy", "claim", "reason"),
    (
        ("Jumps", START, "start adapters from B = 0"),
        ("ZeroesAGradient", FROZEN, "move backbone.vit.norm.weight, under a weight decay"),
        ("Reorders", FROZEN, "blocks.0.mlp.fc1.weight.* where no adapter could have been merged"),
        ("LowersOldLogits", HEADS, "head.parts.0.bias in the rows of old classes"),
        ("MergesWithoutScale", MERGE, "merge what was trained, scale included"),
        ("ReplacesParameters", OPTIMIZER, "before the first step the optimizer holds a tensor"),
        ("CentresBatches", TASK, "an image alone gets other logits"),
        ("AsksForTheTask", TASK, "let it take the images alone"),
        ("ReadsTheLabels", TASK, "other logits when the labels are others"),
        ("Replays", DATA, "experience 2 shows the backbone 12 training images of experience 1"),
        ("PeeksAtTheTest", DATA, "experience 1 looks at test images"),
        ("DrawsTooEarly", SEED, "draw random numbers in the hooks"),
        (
            "KeepsAPlainTensor",
            CHECKPOINT,
            "cut off before the pass over its data: keep what training depends on",
        ),
        ("HoardsUpdates", MEMORY, "4096 bytes are added in one experience, and 0 are declared"),
        ("KeepsHalf", PRECISION, "under bf16-mixed the strategy keeps centre in half precision"),
        ("DecomposesFeatures", PRECISION, "it stopped with.*BFloat16"),
        ("RepeatsItself", STEP, "in experience 2 and .* in experience 20, and nothing is declared"),
        ("RepeatsItselfAndBlamesTheBasis", STEP, "basis is declared to explain it"),
    ),
)
def test_a_wrong_strategy_breaks_its_claim_and_no_other(strategy: str, claim: str, reason: str) -> None:
    broken = failed(checked(f"{WRONG}:{strategy}"))
    # What the optimizer holds and the strategy does not is in no checkpoint either.
    follows = {CHECKPOINT} if claim == OPTIMIZER else set()
    assert broken.keys() == {claim} | follows
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(broken[claim])


@pytest.mark.parametrize(
    ("strategy", "claim", "words"),
    (
        ("JumpsAndSaysSo", START, "declared otherwise"),
        ("RepeatsItselfAndSaysSo", STEP, "for each of the old classes"),
    ),
)
def test_what_is_declared_is_no_failure_and_is_shown(strategy: str, claim: str, words: str) -> None:
    found = checked(f"{WRONG}:{strategy}")
    assert failed(found) == {}
    assert words in found[claim].why
