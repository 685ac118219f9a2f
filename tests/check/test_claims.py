import ast
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from cl_bench import check as checks
from cl_bench.check.command import CLAIMS
from cl_bench.check.subject import Moment
from cl_bench.check.training import Stages, _remedy_of_start
from cl_bench.contracts.strategy import Promises

Checked = Callable[..., Any]

WRONG = Path(__file__).with_name("wrong_strategies.py")
WRONG_DATA = Path(__file__).with_name("wrong_data.py")
WRONG_PROMISES = Path(__file__).with_name("wrong_promises.py")

(
    LEARNT,
    START,
    FROZEN,
    HEADS,
    MERGE,
    OPTIMIZER,
    TASK,
    DATA,
    KEPT,
    SEED,
    RESUME,
    STATE,
    PRECISION,
    STEP,
    CONSTANT,
) = CLAIMS


def together(claim: str) -> tuple[str, ...]:
    """The claims that are checked by the same training as ``claim``."""
    groups = ((START, FROZEN, HEADS, MERGE, OPTIMIZER, CONSTANT), (TASK, DATA), (STATE, STEP))
    return next((group for group in groups if claim in group), (claim,))


FAULTS = [
    *(
        (WRONG, *fault)
        for fault in (
            (
                "ClimbsTheLoss",
                LEARNT,
                "% of its test images are classified correctly, and guesses reach less than",
            ),
            ("ShiftsTheLabels", LEARNT, "let the loss fall as the logits of the own classes of images rise"),
            ("Jumps", START, "writes .*adapters.*; let a new adapter add nothing before the first step"),
            ("DrawsOnce", START, "writes shift; .* declare drawn_once in Promises if it is drawn once"),
            ("DrawsTwice", START, "experience 3 starts .* writes shift; draw in the first experience only"),
            ("DrawsUnannounced", START, "features stops with AttributeError.*and declared by drawn_once"),
            ("ZeroesAGradient", FROZEN, "under a weight decay, .* move backbone.vit.norm.weight"),
            ("Reorders", FROZEN, "blocks.0.mlp.fc1.weight.* where no adapter could have been merged"),
            ("TrainsOldAdapters", FROZEN, "experience 2 move .*adapters.k.A.*freeze the old ones"),
            ("LowersOldLogits", HEADS, "head.parts.0.bias in the rows of old classes"),
            ("MergesWithoutScale", MERGE, "keep exactly what was trained, with its scale"),
            ("ReplacesParameters", OPTIMIZER, "before the first step the optimizer holds a tensor"),
            (
                "DrawsTooEarly",
                SEED,
                "noise differ .*so the constructor draws them: draw random numbers in the hooks",
            ),
            (
                "DrawsPromptsTooEarly",
                SEED,
                "prompts differ .*drawn in the first expand, and declared by drawn_once",
            ),
            ("KeepsAPlainTensor", RESUME, "interrupted before the pass over its data: keep what training"),
            ("RemembersInItsClass", RESUME, "keep what training depends on in parameters and buffers"),
            (
                "RemembersInExtraState",
                STATE,
                "an experience adds 256 bytes outside head and memory, and 0 are",
            ),
            (
                "HidesInItsOptimizer",
                STATE,
                "the optimizer of the stream keeps .* bytes, and 4 numbers for each",
            ),
            (
                "HoardsUpdates",
                STATE,
                "an experience adds 4096 bytes outside head and memory, and 0 are declared",
            ),
            ("HoardsMoreAndMore", STATE, "adds 49152 bytes.* more than the 8192 of experience 2"),
            (
                "DeclaresGrowthInVain",
                STATE,
                "an experience adds 0 bytes.*remove experiences from state_grows_with",
            ),
            ("FattensItsHead", STATE, "add 272 to 308 bytes to the head: keep as much for each class"),
            ("KeepsHalf", PRECISION, "under bf16-mixed the strategy keeps centre in half precision"),
            ("DecomposesFeatures", PRECISION, "it stopped with.*BFloat16"),
            ("RepeatsItself", STEP, "in experience 2 and .* in experience 12, and no growth is declared"),
            ("RepeatsItselfAndBlamesTheBasis", STEP, "which columns in the memory do not explain"),
            ("RepeatsItselfMoreAndMore", STEP, "which old experiences do not explain"),
            (
                "DeclaresMovingFeatures",
                CONSTANT,
                "features is declared constant, and experience 2 changes it by",
            ),
        )
    ),
    *(
        (WRONG_DATA, *fault)
        for fault in (
            ("CentresBatches", TASK, "an image gets other logits in a batch of its own"),
            ("PoolVotes", TASK, "an image gets other logits in a batch of its own"),
            ("AsksForTheTask", TASK, "let it take images and nothing else"),
            ("ReadsTheLabels", TASK, "other logits if the labels are wrong"),
            ("PoolSeesTheTask", TASK, "other logits if the labels are wrong"),
            ("CountsTheBatches", TASK, "other logits in another batch of the pass"),
            (
                "RidgeLearnsAtTest",
                TASK,
                "test images change head.products, head.sums: learn from training images",
            ),
            ("Replays", DATA, "experience 2 shows the backbone 12 training images of experience 1"),
            ("PeeksAtTheTest", DATA, "experience 1 looks at test images"),
            ("RidgeFitsTheTest", DATA, "experience 1 looks at test images"),
            ("KeepsImages", KEPT, "leaves 77. bytes behind .* in memory, and training_data is none"),
            ("KeepsFeatures", KEPT, "leaves 13. bytes behind .* in memory, and training_data is none"),
            ("KeepsElsewhere", KEPT, "keep statistics of all images of a class or experience"),
            (
                "KeepsImagesAndSaysFeatures",
                KEPT,
                "a feature has 256: .* set training_data to images in Promises",
            ),
        )
    ),
    *(
        (WRONG_PROMISES, *fault)
        for fault in (
            (
                "StartsElsewhereInVain",
                START,
                "start_within=None is declared, .* remove start_within from Promises",
            ),
            ("JumpsLessThanItSays", START, "start_within=5e-01 is declared, .* promise what is kept"),
            ("DrawsNothing", START, "draws nothing that changes a feature: remove drawn_once"),
            ("MergesExactly", MERGE, "merge_within=None is declared, .* remove merge_within from Promises"),
            ("LeavesItsHead", HEADS, "keeps_old_head=False is declared, and no experience changes"),
            (
                "KeepsNoVectors",
                STATE,
                "vectors_per_class=1 is declared, and an experience adds 0 bytes of 256",
            ),
            ("GrowsWithClassesInVain", STATE, "no experience adds more bytes .* remove classes"),
            ("StepsAlike", STEP, "growth with classes is declared, .* remove classes from step_grows_with"),
            ("KeepsNoFeatures", KEPT, "and features are declared: remove training_data from Promises"),
        )
    ),
]
"""Wrong strategies: the file, the class, the claim that it breaks, and what the verdict names."""


@pytest.mark.parametrize(("file", "strategy", "claim", "reason"), FAULTS)
def test_a_wrong_strategy_breaks_its_claim(
    checked: Checked, file: Path, strategy: str, claim: str, reason: str
) -> None:
    broken = checked(f"{file}:{strategy}", claims=together(claim)).broken
    assert broken.keys() == {claim}
    assert re.search(reason, broken[claim]), broken[claim]


@pytest.mark.soak
@pytest.mark.parametrize(("file", "strategy", "claim", "reason"), FAULTS)
def test_a_wrong_strategy_breaks_no_other_claim(
    checked: Checked, file: Path, strategy: str, claim: str, reason: str
) -> None:
    # No checkpoint holds a parameter that the optimizer has and the strategy has not.
    follows = {RESUME} if claim == OPTIMIZER else set()
    assert checked(f"{file}:{strategy}").broken.keys() == {claim} | follows


@pytest.mark.parametrize(
    ("file", "strategy", "claim", "words"),
    (
        (WRONG, "JumpsAndSaysSo", START, "declared otherwise"),
        (WRONG, "RepeatsItselfAndSaysSo", STEP, "for each of the old experiences"),
        (WRONG, "HoardsUpdatesAndSaysSo", STATE, "and 4096 to the rest"),
        (WRONG, "DrawsOnceAndSaysSo", START, "parts drawn in experience 1, the same bits in 3 experiences"),
        (WRONG_DATA, "KeepsFeaturesAndSaysSo", KEPT, "features are declared"),
        (WRONG_DATA, "ReplaysAndSaysSo", DATA, "the backbone saw 72 older ones again, as declared"),
        (WRONG_PROMISES, "Covariances", STATE, "and 8448 to the rest"),
        (WRONG_PROMISES, "ASpaceForEveryExperience", STATE, "264 bytes to the head and 3072 to the rest"),
        (WRONG_PROMISES, "KeepsLessAndLess", STATE, "and 1024 to the rest"),
    ),
)
def test_what_is_declared_passes_and_is_shown(
    checked: Checked, file: Path, strategy: str, claim: str, words: str
) -> None:
    found = checked(f"{file}:{strategy}", claims=together(claim))
    assert found.broken == {}
    assert words in found[claim].why


def test_correct_pools_and_ridge_heads_keep_the_contract(checked: Checked) -> None:
    for strategy in ("Pool", "Ridge", "RidgeOfLittle"):
        assert checked(f"{WRONG_DATA}:{strategy}", claims=(TASK, DATA, KEPT)).broken == {}


def hints() -> dict[str, str]:
    """Return the text of every message of a broken claim, with what is filled in left out, by its place."""
    found = {}
    for file in sorted(Path(checks.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and getattr(node.exc, "func", None) is not None:
                call = cast(ast.Call, node.exc)
                if isinstance(call.func, ast.Name) and call.func.id == "Broken":
                    texts = [one.value for one in ast.walk(call) if isinstance(one, ast.Constant)]
                    found[f"{file.name}:{node.lineno}"] = "".join(map(str, texts))
    return found


DISCLOSED = {"training_data", "drawn_once"}
"""Exceptions that a hint may name: results show the first, and the second is held from both sides."""


def test_a_hint_names_an_exception_from_a_claim_only_to_remove_it() -> None:
    assert len(hints()) > 30
    exceptions = {field.name for field in fields(Promises)} - {"constant"} - DISCLOSED
    for place, text in hints().items():
        _, _, hint = text.partition(": ")
        for name in exceptions:
            assert name not in hint or "remove" in hint, f"{place} points to {name}: {text}"


def test_hints_leave_no_place_where_state_is_not_counted() -> None:
    for place, text in hints().items():
        assert "B = 0" not in text, place
        assert "get_extra_state" not in text or "counts as stored" in text, place


@pytest.mark.parametrize(
    ("written", "names_factors"),
    (("vit.blocks.0.attn.qkv.adapters.q.A", True), ("prompts", False), ("bias.adapters", False)),
)
def test_an_up_projection_of_zeros_is_advised_only_for_adapters(written: str, names_factors: bool) -> None:
    def moment(value: float) -> Moment:
        nothing = torch.zeros(1, 0)
        return Moment(
            {written: torch.tensor([value])}, frozenset(), frozenset(), nothing, nothing, "", nothing
        )

    stages = Stages(moment(0.0), moment(1.0), moment(1.0), moment(1.0), [])
    for index in (0, 1):
        for drawn_once in (False, True):
            remedy = _remedy_of_start(index, stages, drawn_once)
            assert ("up-projection" in remedy) == names_factors
            assert written in remedy
