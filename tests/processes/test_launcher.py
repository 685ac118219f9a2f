from __future__ import annotations

import pytest

from cl_bench.processes.launcher import launched, rank, with_launcher


def test_a_launcher_and_a_command_cannot_contradict_each_other() -> None:
    two = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert "--trainer.num_nodes=2" in with_launcher([], two)
    fabric = two | {"LT_CLI_USED": "1", "LT_PRECISION": "bf16-mixed"}
    assert "--trainer.precision=bf16-mixed" in with_launcher([], fabric)
    with pytest.raises(ValueError, match=r"so the launcher decides --devices\. Remove the option"):
        with_launcher(["--rank", "4", "--trainer.devices=1"], two)


def test_a_process_reads_its_rank_from_a_launcher_or_from_lightning() -> None:
    assert (launched({}), rank({})) == (1, 0)
    assert (launched({"LOCAL_RANK": "1"}), rank({"LOCAL_RANK": "1"})) == (1, 1)
    by_torchrun = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}
    assert (launched(by_torchrun), rank(by_torchrun)) == (4, 3)
