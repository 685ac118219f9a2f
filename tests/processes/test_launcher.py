from __future__ import annotations

import pytest

from cl_bench.processes.launcher import launched, rank, with_launcher


def test_a_launcher_and_a_command_cannot_contradict_each_other() -> None:
    two = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert "--trainer.num_nodes=2" in with_launcher([], two)
    fabric = two | {"LT_CLI_USED": "1", "LT_PRECISION": "bf16-mixed"}
    assert "--trainer.precision=bf16-mixed" in with_launcher([], fabric)
    assert with_launcher(["--trainer.strategy", "ddp"], two)[:2] == ["--trainer.strategy", "ddp"]
    assert with_launcher(["--setting", "strategy"], two)[:2] == ["--setting", "strategy"]
    for words in (["--rank", "4", "--trainer.devices=1"], ["--devices", "1", "--rank=4"]):
        with pytest.raises(ValueError, match="decides --devices, which is 2 here: remove the option"):
            with_launcher(words, two)
    with pytest.raises(ValueError, match="decides --strategy, which is ddp here"):
        with_launcher(["--trainer.strategy", "fsdp"], two)
    with pytest.raises(ValueError, match="decides --precision, which is bf16-mixed here"):
        with_launcher(["--precision=32"], fabric)


def test_a_process_reads_its_rank_from_a_launcher_or_from_lightning() -> None:
    assert (launched({}), rank({})) == (1, 0)
    assert (launched({"LOCAL_RANK": "1"}), rank({"LOCAL_RANK": "1"})) == (1, 1)
    by_torchrun = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}
    assert (launched(by_torchrun), rank(by_torchrun)) == (4, 3)
