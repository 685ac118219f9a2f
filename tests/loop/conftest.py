"""What the tests of the loop share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from cl_bench.network.backbones import Backbone


@pytest.fixture(scope="session")
def backbone(tiny_backbone: Callable[..., Backbone]) -> Callable[..., Backbone]:
    """Makes the tiny ViT, for images mapped to [-1, 1]."""
    return partial(tiny_backbone, normalisation="half")
