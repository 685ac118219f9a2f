"""What every test relies on: no network, no display, a tiny backbone, and development data if present."""

from __future__ import annotations

import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from cl_bench.network.backbones import Backbone, Normalisation

# On a busy machine, two processes of one thread each are faster than one whose threads wait for each other.
torch.set_num_threads(1)

# matplotlib, wandb, huggingface_hub and ray read these when they are first imported: set them before any test
# module is imported. Ray's variable, meant for systems without clusters, keeps all its nodes at 127.0.0.1.
# The processes that tests start have one thread too.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
    "WANDB_MODE": "offline",
    "HF_HUB_OFFLINE": "1",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def chosen(request: pytest.FixtureRequest) -> Callable[[str], set[str]]:
    """Function that returns the values of a parameter in the tests that run."""
    tests = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    return lambda parameter: {params[parameter] for params in tests if isinstance(params.get(parameter), str)}


def pytest_collection_finish() -> None:
    """Let the search for what a training leaves behind skip the tests of other rooms.

    No command imports them, and to search what is reached from thousands of tests takes seconds.
    """
    leftovers: Any = sys.modules.get("cl_bench.check.leftovers")
    if leftovers is not None:
        leftovers.INSTALLED |= {str(room) for room in (CHECKOUT / "tests").iterdir() if room.name != "check"}


@pytest.fixture(scope="session")
def checkout() -> Path:
    """Root of this checkout."""
    return CHECKOUT


@pytest.fixture(scope="session")
def development_data() -> Path:
    """Folder of a real stream and a small pretrained backbone, too large to commit."""
    folder = Path(os.environ.get("CL_BENCH_DEVELOPMENT_DATA", CHECKOUT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"No development data at {folder}: name its folder in CL_BENCH_DEVELOPMENT_DATA.")
    return folder


@pytest.fixture(scope="session")
def tiny_backbone() -> Callable[..., Backbone]:
    """Makes a ViT of two blocks, 32 wide, for images of 8 pixels; its options go by keyword."""
    return _tiny_backbone


def _tiny_backbone(
    weights: str | Path = "random",
    *,
    normalisation: Normalisation = "unit",
    seed: int = 0,
    compiler: str | None = None,
    **options: Any,
) -> Backbone:
    from cl_bench.network.backbones import Backbone

    tiny = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return Backbone("vision_transformer", str(weights), tiny | options, normalisation, seed, compiler)


@pytest.fixture(scope="session")
def wandb_records() -> Callable[[Path], list[Any]]:
    """Returns the records that an offline run of W&B, given its folder, would send."""
    return _complete


def _complete(folder: Path) -> list[Any]:
    """Return all records of a finished run, which another process may write after the run has ended."""
    late = time.monotonic() + 60
    while not (records := [*_records(folder)]) or records[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < late, f"{folder} holds {len(records)} records and not the last one"
        time.sleep(0.1)
    return records


def _records(folder: Path) -> Iterator[Any]:
    """Yield the records of an offline run: after seven bytes, a log in LevelDB's format."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    (path,) = folder.glob("run-*.wandb")
    content, position, pieces = path.read_bytes(), 7, b""
    while position < len(content):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        pieces += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = Record()
            record.ParseFromString(pieces)
            yield record
            pieces = b""
