from pathlib import Path

import pytest

from cl_bench.check.claims import CLAIMS, verdicts
from cl_bench.check.command import layer
from cl_bench.check.subject import Subject, Verdict
from cl_bench.run.configs import CONFIGS
from cl_bench.run.run import quiet

WRONG = Path(__file__).with_name("wrong_strategies.py")

START, FROZEN, HEADS, MERGE, OPTIMIZER, TASK, DATA, SEED, RESUME, STATE, PRECISION, STEP, CONSTANT = CLAIMS


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
        ("Jumps", START, "let new parts add nothing before the first step, or declare start_within"),
        ("DrawsOnce", START, "declare drawn_once in Promises if these serve the whole stream"),
        ("DrawsTwice", START, "experience 3 starts .* draw in the first experience only"),
        ("ZeroesAGradient", FROZEN, "under a weight decay, .* move backbone.vit.norm.weight"),
        ("Reorders", FROZEN, "blocks.0.mlp.fc1.weight.* where no adapter could have been merged"),
        ("LowersOldLogits", HEADS, "head.parts.0.bias in the rows of old classes"),
        ("MergesWithoutScale", MERGE, "keep exactly what was trained, with its scale"),
        ("ReplacesParameters", OPTIMIZER, "before the first step the optimizer holds a tensor"),
        ("CentresBatches", TASK, "an image gets other logits in a batch of its own"),
        ("AsksForTheTask", TASK, "let it take images and nothing else"),
        ("ReadsTheLabels", TASK, "other logits if the labels are wrong"),
        ("Replays", DATA, "experience 2 shows the backbone 12 training images of experience 1"),
        ("PeeksAtTheTest", DATA, "experience 1 looks at test images"),
        ("DrawsTooEarly", SEED, "draw random numbers in the hooks"),
        ("KeepsAPlainTensor", RESUME, "interrupted before the pass over its data: keep what training"),
        ("HoardsUpdates", STATE, "an experience adds 4096 bytes outside head and memory, and 0 are declared"),
        ("HoardsMoreAndMore", STATE, "experiences add 12288 to 81920 bytes.*equal growth is declared"),
        ("DeclaresGrowthInVain", STATE, "an experience adds 0 bytes.*drop experiences from state_grows_with"),
        ("FattensItsHead", STATE, "add 272 to 340 bytes to the head: keep as much for each class"),
        ("KeepsHalf", PRECISION, "under bf16-mixed the strategy keeps centre in half precision"),
        ("DecomposesFeatures", PRECISION, "it stopped with.*BFloat16"),
        ("RepeatsItself", STEP, "in experience 2 and .* in experience 20, and no growth is declared"),
        ("RepeatsItselfAndBlamesTheBasis", STEP, "which columns in the memory do not explain"),
        ("RepeatsItselfMoreAndMore", STEP, "which old experiences do not explain"),
        ("DeclaresMovingFeatures", CONSTANT, "features is declared constant, and experience 2 changes it by"),
    ),
)
def test_a_wrong_strategy_breaks_its_claim_and_no_other(strategy: str, claim: str, reason: str) -> None:
    broken = failed(checked(f"{WRONG}:{strategy}"))
    # No checkpoint holds a parameter that the optimizer has and the strategy has not.
    follows = {RESUME} if claim == OPTIMIZER else set()
    assert broken.keys() == {claim} | follows
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(broken[claim])


@pytest.mark.parametrize(
    ("strategy", "claim", "words"),
    (
        ("JumpsAndSaysSo", START, "declared otherwise"),
        ("RepeatsItselfAndSaysSo", STEP, "for each of the old experiences"),
        ("HoardsUpdatesAndSaysSo", STATE, "and 4096 to the rest"),
        (
            "DrawsOnceAndSaysSo",
            START,
            "parts drawn in experience 1, the same bits in 3 experiences",
        ),
    ),
)
def test_what_is_declared_passes_and_is_shown(strategy: str, claim: str, words: str) -> None:
    found = checked(f"{WRONG}:{strategy}")
    assert failed(found) == {}
    assert words in found[claim].why


def test_features_that_only_the_first_expand_makes_must_be_declared() -> None:
    broken = failed(checked(f"{WRONG}:DrawsUnannounced"))
    assert broken.keys() == {START, FROZEN, HEADS, MERGE, OPTIMIZER}
    assert "features stops with AttributeError" in broken[START]
    assert "declare drawn_once in Promises" in broken[START]
