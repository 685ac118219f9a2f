from __future__ import annotations

from cl_bench.network.backbones import Backbone
from cl_bench.reproduce.cost import speed

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def test_the_speed_of_this_machine_is_measured() -> None:
    measured = speed(Backbone("vision_transformer", weights="random", options=TINY))
    assert 0 < measured.evaluation
    assert 0 < measured.training < 10
    assert "thread" in measured.device
